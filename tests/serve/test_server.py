"""Clients over real sockets that stall, leave or ask for too much; and the server's shutdown."""

import asyncio
import contextlib
import os
import socket
import time
import urllib.request

import pytest

from tests.search import library
from tests.serve import browser, treacherous
from vop_jax.search.searcher import open_searcher
from vop_jax.serve import middleware
from vop_jax.serve.app import Settings, make_app
from vop_jax.serve.executor import Executor

HANG = 600  # seconds; limit of what should come at once
LARGE = 24 << 20  # bytes: more than the kernel buffers for a connection


@pytest.fixture(scope="module")
def large(films, retriever, tmp_path_factory):
    """A searcher of a large film, 1, and of small ones."""
    root = tmp_path_factory.mktemp("large")
    library.copy(films[0], root / "films")
    with open(root / "films" / "a.mp4", "ab") as film:  # a box that decoders skip
        film.write(LARGE.to_bytes(4, "big") + b"free")
        film.truncate(film.tell() + LARGE - 8)
    library.make(root / "index", root / "films", retriever)
    return open_searcher(root / "index", retriever=retriever)


@pytest.fixture
def start(large):
    """Starts a server of it; (port, server)."""
    with contextlib.ExitStack() as stack:

        def one(**limits):
            app = make_app({"large": large}, Settings(workers=1))
            address, server = stack.enter_context(browser.served(app, shutdown=0.2, **limits))
            return int(address.rpartition(":")[2]), server

        yield one


@pytest.fixture
def connect():
    """Opens a connection with small buffers, and sends a request."""
    with contextlib.ExitStack() as stack:

        def one(port, request=b""):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(HANG)
            client.connect(("127.0.0.1", port))
            client.sendall(request)
            return client

        yield one


def get(path, *headers, method="GET"):
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", *headers)
    return "\r\n".join((*lines, "", "")).encode()


def read(client):
    """Everything until the server closes the connection."""
    return b"".join(iter(lambda: client.recv(1 << 20), b""))


def fetch(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=HANG) as response:
        return response.read()


def until(condition):
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("clients", [8, pytest.param(600, marks=pytest.mark.slow)])
def test_clients_that_stall_cost_little_and_not_for_long(start, connect, monkeypatch, clients):
    monkeypatch.setattr(middleware, "STREAMS", 8)
    port, server = start(idle=0.3 if clients == 8 else 1.0, stalled=0.6 if clients == 8 else 3.0)
    fetch(port, "/api/thumbnail/large/2")
    before = len(os.listdir("/dev/fd"))
    connections = server.server_state.connections
    stalled = [connect(port, get("/media/large/1")) for _ in range(clients)]
    if clients == 8:
        until(lambda: len(server.server_state.tasks) == 8)
        # More videos are refused, other requests are answered.
        stalled.append(connect(port, get("/media/large/1", "Connection: close")))
        response = read(stalled[-1])
        assert b" 503 " in response and b'{"error":"too many videos' in response
        # Connections without a request, or with half of one, are closed.
        stalled += [connect(port), connect(port, b"GET / HTTP/1.1\r\nHost: loc")]
    assert fetch(port, "/api/thumbnail/large/2?t=1")
    assert len(os.listdir("/dev/fd")) < before + 2 * clients + 2 * 8 + 16
    until(lambda: not connections)
    for client in stalled:
        client.close()
    until(lambda: len(os.listdir("/dev/fd")) <= before)
    # A client that pauses for a shorter time gets the whole film.
    patient = connect(port, get("/media/large/1", "Connection: close"))
    time.sleep(0.3)
    assert len(read(patient)) > LARGE


def test_too_many_connections_are_refused(start, connect):
    port, server = start(connections=3)
    clients = [connect(port) for _ in range(3)]
    until(lambda: len(server.server_state.connections) == 3)
    response = read(connect(port))
    assert response.startswith(b"HTTP/1.1 503 ")
    assert response.endswith(b'{"error": "too many connections; try again"}')
    clients.pop().close()
    until(lambda: len(server.server_state.connections) == 2)
    assert fetch(port, "/healthz") == b'{"status":"ok"}'


def upload(size, header="Content-Length: {}"):
    """(head, body) of a request with a file of `size` bytes."""
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    body = part + bytes(size) + b"\r\n--b--\r\n"
    headers = ("Content-Type: multipart/form-data; boundary=b", header.format(len(body)))
    return get("/api/search/video", *headers, method="POST"), body


def test_malformed_requests_and_stalled_uploads_are_refused(start, connect, caplog, monkeypatch):
    port, server = start()
    for request in (
        b"nonsense\r\n\r\n",
        get("/", "Content-Length: x"),
        b"\x16\x03\x01\xff\r\n\r\n",
    ):
        response = read(connect(port, request))
        assert response.startswith(b"HTTP/1.1 400 ")
        assert response.endswith(b'{"error": "not a valid HTTP request"}')
    # When the response has begun, nothing is mixed into it.
    client = connect(port, get("/media/large/1", "Transfer-Encoding: chunked") + b"nonsense\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert b"not a valid" not in read(client)
    monkeypatch.setattr(middleware, "UPLOAD_PAUSE", 0.2)
    head, body = upload(1000)
    response = read(connect(port, head + body[:100]))
    assert b" 408 " in response and b'{"error":"the upload stalled"}' in response
    until(lambda: not server.server_state.tasks)
    assert not caplog.records


def test_uploads_whose_clients_have_left_are_not_decoded(start, connect, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    decoding = []

    async def decode(*call):
        decoding.append("started")
        try:
            await asyncio.sleep(HANG)
        finally:
            decoding.append("ended")

    monkeypatch.setattr(Executor, "decode", decode)
    port, server = start()
    head, body = upload(200_000)
    chunked, _ = upload(0, "Transfer-Encoding: chunked")
    for request in (
        head + body[:100_000],
        chunked + b"1000\r\n" + body[:0x1000] + b"\r\n",
        chunked + b"1000\r\n" + body[:0x0800],
    ):
        connect(port, request).close()
    until(lambda: not server.server_state.tasks)
    assert not decoding
    client = connect(port, head + body)
    until(lambda: decoding)
    client.close()
    until(lambda: decoding == ["started", "ended"])
    until(lambda: not server.server_state.tasks)
    assert not list(tmp_path.iterdir())


def test_a_shutdown_aborts_running_requests(large, connect, monkeypatch, caplog):
    monkeypatch.setattr("vop_jax.serve.media.thumbnail", treacherous.hang)
    app = make_app({"large": large}, Settings(workers=1))
    with browser.served(app, shutdown=0.2) as (address, server):
        port = int(address.rpartition(":")[2])
        paths = ["/media/large/1", "/api/thumbnail/large/1", "/api/thumbnail/large/2"]
        for path in paths:
            connect(port, get(path))
        until(lambda: len(server.server_state.tasks) == 3)
    # uvicorn logs requests that do not end in time.
    assert not [line for line in caplog.records if line.name.startswith("uvicorn")]
