"""Clients over real sockets that stall, leave or ask for too much; and the server's shutdown."""

import asyncio
import contextlib
import os
import socket
import urllib.request

import pytest

from tests.processes import HANG, until
from tests.serve import treacherous
from tests.serve.conftest import served
from vop_jax.serve import media, middleware
from vop_jax.serve.app import Settings, make_app
from vop_jax.serve.executor import Executor

LARGE = 24 << 20  # bytes: more than the kernel buffers for a connection


@pytest.fixture
def serving(searcher, tmp_path_factory, monkeypatch):
    """Starts a server whose videos are large: (port, server)."""
    film = tmp_path_factory.mktemp("large") / "film"
    film.touch()
    os.truncate(film, LARGE)
    monkeypatch.setattr(media, "open_indexed", lambda folder, record: film.open("rb"))

    def start(**limits):
        app = make_app({"films": searcher}, Settings(workers=1))
        app.state.services.executor.start = lambda: None  # decoders start when they are needed
        return served(app, **{"shutdown": 0.2} | limits)

    return start


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


def request(path, *headers, method="GET"):
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", *headers)
    return "\r\n".join((*lines, "", "")).encode()


FILM = request("/media/films/1", "Connection: close")


def read(client):
    """Everything until the server closes the connection."""
    return b"".join(iter(lambda: client.recv(1 << 20), b""))


def assert_healthy(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=HANG) as response:
        assert response.read() == b'{"status":"ok"}'


@pytest.mark.parametrize("more", [1, pytest.param(600, marks=pytest.mark.slow)])
def test_clients_that_stall_are_limited_in_number_and_cost_little(
    serving, connect, monkeypatch, more
):
    monkeypatch.setattr(middleware, "STREAMS", 8)
    with serving(stalled=HANG) as (port, server):
        connections = server.server_state.connections
        before = len(os.listdir("/dev/fd"))
        stalled = [connect(port, FILM) for _ in range(8)]
        until(lambda: sum(bool(one._stalled) for one in [*connections]) == 8)
        waiting = [*connections]
        refused = [connect(port, FILM) for _ in range(more)]
        assert_healthy(port)
        assert len(os.listdir("/dev/fd")) < before + 4 * 8 + 2 * more + 16
        for client in refused:
            response = read(client)
            assert b" 503 " in response and b'{"error":"too many videos' in response
        # One that goes on reading gets the whole film, and no time limit runs any more.
        assert len(read(stalled[0])) > LARGE
        until(lambda: sum(one._stalled.cancelled() for one in waiting) == 1)
        for client in stalled:
            client.close()
        until(lambda: not connections)


def test_stalled_and_idle_connections_are_closed(serving, connect):
    before = len(os.listdir("/dev/fd"))
    with serving(stalled=0.1) as (port, server):
        client = connect(port, FILM)
        assert client.recv(1) == b"H"  # and no more
        until(lambda: not server.server_state.connections)
        client.close()
    with serving(idle=0.1) as (port, _):
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            with connect(port, sent) as client:
                assert read(client) == b""
    assert len(os.listdir("/dev/fd")) <= before


def test_too_many_connections_are_refused(serving, connect):
    with serving(connections=3) as (port, server):
        clients = [connect(port) for _ in range(3)]
        until(lambda: len(server.server_state.connections) == 3)
        response = read(connect(port))
        assert response.startswith(b"HTTP/1.1 503 ")
        assert response.endswith(b'{"error": "too many connections; try again"}')
        clients.pop().close()
        until(lambda: len(server.server_state.connections) == 2)
        assert_healthy(port)


def upload(size, header="Content-Length: {}"):
    """(head, body) of a request with a file of `size` bytes."""
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    body = part + bytes(size) + b"\r\n--b--\r\n"
    headers = ("Content-Type: multipart/form-data; boundary=b", header.format(len(body)))
    return request("/api/search/video", *headers, method="POST"), body


def test_malformed_requests_and_stalled_uploads_are_refused(serving, connect, caplog, monkeypatch):
    monkeypatch.setattr(middleware, "UPLOAD_PAUSE", 0.1)
    wrong = b"nonsense\r\n\r\n", request("/", "Content-Length: x"), b"\x16\x03\x01\r\n\r\n"
    head, body = upload(1000)
    chunked = request("/media/films/1", "Transfer-Encoding: chunked")
    with serving() as (port, server):
        for sent in wrong:
            response = read(connect(port, sent))
            assert response.startswith(b"HTTP/1.1 400 ")
            assert response.endswith(b'{"error": "not a valid HTTP request"}')
        # When the response has begun, nothing is mixed into it.
        client = connect(port, chunked + b"nonsense\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"not a valid" not in read(client)
        response = read(connect(port, head + body[:100]))
        assert b" 408 " in response and b'{"error":"the upload stalled"}' in response
        until(lambda: not server.server_state.tasks)
    assert not caplog.records


def test_uploads_whose_clients_have_left_are_not_decoded(serving, connect, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    decoding = []

    async def decode(*call):
        decoding.append("started")
        try:
            await asyncio.sleep(HANG)
        finally:
            decoding.append("ended")

    monkeypatch.setattr(Executor, "decode", decode)
    head, body = upload(200_000)
    chunked, _ = upload(0, "Transfer-Encoding: chunked")
    with serving() as (port, server):
        for part in (
            head + body[:100_000],
            chunked + b"1000\r\n" + body[:0x1000] + b"\r\n",
            chunked + b"1000\r\n" + body[:0x0800],
        ):
            connect(port, part).close()
        until(lambda: not server.server_state.tasks)
        assert not decoding
        with connect(port, head + body):
            until(lambda: decoding)
        until(lambda: decoding == ["started", "ended"])
        until(lambda: not server.server_state.tasks)
    assert not list(tmp_path.iterdir())


def test_a_shutdown_aborts_running_requests(serving, connect, monkeypatch, caplog):
    monkeypatch.setattr(media, "thumbnail", treacherous.hang)
    with serving() as (port, server):
        for path in ("/media/films/1", "/api/thumbnail/films/1", "/api/thumbnail/films/2"):
            connect(port, request(path))
        until(lambda: len(server.server_state.tasks) == 3)
    # uvicorn logs requests that do not end in time.
    assert not [line for line in caplog.records if line.name.startswith("uvicorn")]
