"""Clients over real sockets: those that stall, leave, or ask for too much; and the server's end."""

import concurrent.futures
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
from vop_jax.serve.sandbox import Sandbox

HANG = 600  # seconds; of waiting for what comes at once
LARGE = 24 << 20  # bytes: more than the kernel keeps of a connection


@pytest.fixture(scope="module")
def large(films, retriever, tmp_path_factory):
    """A searcher of a film that is large, 1, and of small ones."""
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
            address, server = stack.enter_context(browser.served(app, ending=0.2, **limits))
            return int(address.rpartition(":")[2]), server

        yield one


@pytest.fixture
def connect():
    """Opens a connection, whose answers wait in small buffers, and asks."""
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
    """All that comes until the end."""
    return b"".join(iter(lambda: client.recv(1 << 20), b""))


def ask(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=HANG) as answer:
        return answer.read()


def until(condition):
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_clients_that_stall_cost_little_and_not_for_long(start, connect, monkeypatch):
    monkeypatch.setattr(middleware, "STREAMS", 8)
    port, server = start(idle=0.3, stalled=0.6)
    ask(port, "/api/thumbnail/large/2")
    before = len(os.listdir("/dev/fd"))
    connections = server.server_state.connections
    stalled = [connect(port, get("/media/large/1")) for _ in range(8)]
    until(lambda: len(server.server_state.tasks) == 8)
    # More videos are refused, anything else is answered.
    refused = connect(port, get("/media/large/1", "Connection: close"))
    assert b" 503 " in (answer := read(refused)) and b'{"error":"too many videos' in answer
    assert ask(port, "/api/thumbnail/large/2?t=1")
    # Neither is one waited for that asks for nothing, or never to its end, or takes no refusal.
    others = [connect(port), connect(port, b"GET / HTTP/1.1\r\nHost: loc")]
    until(lambda: not connections)
    for client in (*stalled, refused, *others):
        client.close()
    until(lambda: len(os.listdir("/dev/fd")) <= before)
    # Who pauses, but less, gets all.
    patient = connect(port, get("/media/large/1", "Connection: close"))
    time.sleep(0.3)
    assert len(read(patient)) > LARGE


def test_too_many_connections(start, connect):
    port, server = start(connections=3)
    held = [connect(port) for _ in range(3)]
    until(lambda: len(server.server_state.connections) == 3)
    answer = read(connect(port))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.endswith(b'{"error": "too many connections; try again"}')
    held.pop().close()
    until(lambda: len(server.server_state.connections) == 2)
    assert ask(port, "/healthz") == b'{"status":"ok"}'


def test_what_is_no_http(start, connect, caplog):
    port, server = start()
    for request in (
        b"nonsense\r\n\r\n",
        get("/", "Content-Length: x"),
        b"\x16\x03\x01\xff\r\n\r\n",
    ):
        answer = read(connect(port, request))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b'{"error": "not a valid HTTP request"}')
    # In a request that is answered already: nothing is mixed into its answer.
    client = connect(port, get("/media/large/1", "Transfer-Encoding: chunked") + b"nonsense\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert b"not a valid" not in read(client)
    until(lambda: not server.server_state.tasks)
    assert not caplog.records


def upload(size, header="Content-Length: {}"):
    """(head, body) of a request with a file of so many bytes."""
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    body = part + bytes(size) + b"\r\n--b--\r\n"
    headers = ("Content-Type: multipart/form-data; boundary=b", header.format(len(body)))
    return get("/api/search/video", *headers, method="POST"), body


def test_uploads_whose_clients_have_left_are_not_decoded(start, connect, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    waiting = []

    def submit(*call):
        waiting.append(concurrent.futures.Future())
        return waiting[-1]

    monkeypatch.setattr(Sandbox, "submit", submit)
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
    assert not waiting
    client = connect(port, head + body)
    until(lambda: waiting)
    client.close()
    until(waiting[0].cancelled)
    until(lambda: not server.server_state.tasks)
    assert not list(tmp_path.iterdir())


def test_an_upload_that_does_not_go_on(start, connect, monkeypatch):
    monkeypatch.setattr(middleware, "UPLOAD_PAUSE", 0.2)
    head, body = upload(1000)
    answer = read(connect(start()[0], head + body[:100]))
    assert b" 408 " in answer and b'{"error":"the upload does not go on"}' in answer


def test_its_end_breaks_off_what_is_under_way(large, connect, monkeypatch, caplog):
    monkeypatch.setattr("vop_jax.serve.decoders.thumbnail", treacherous.hang)
    app = make_app({"large": large}, Settings(workers=1))
    with browser.served(app, ending=0.2) as (address, server):
        port = int(address.rpartition(":")[2])
        paths = ["/media/large/1", "/api/thumbnail/large/1", "/api/thumbnail/large/2"]
        for path in paths:
            connect(port, get(path))
        until(lambda: len(server.server_state.tasks) == 3)
    # Nothing had to be given up, which is logged.
    assert not [line for line in caplog.records if line.name.startswith("uvicorn")]


@pytest.mark.slow
def test_six_hundred_that_stall(start, connect):
    port, server = start(idle=1.0, stalled=3.0)
    ask(port, "/api/thumbnail/large/2")
    before = len(os.listdir("/dev/fd"))
    stalled = [connect(port, get("/media/large/1")) for _ in range(600)]
    assert ask(port, "/api/thumbnail/large/2?t=1")
    assert len(os.listdir("/dev/fd")) < before + 2 * 600 + 2 * middleware.STREAMS
    until(lambda: not server.server_state.connections)
    for client in stalled:
        client.close()
    until(lambda: len(os.listdir("/dev/fd")) <= before)
    assert len(ask(port, "/media/large/1")) > LARGE
