"""A server of a small index, inside the process of the tests."""

import contextlib
import socket
import threading
import time

import pytest

from tests.search.conftest import clip, retriever  # noqa: F401
from tests.search.conftest import shared as films  # noqa: F401

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from fastapi.testclient import TestClient

from vop_jax.search.searcher import open_searcher
from vop_jax.serve.app import Settings, make_app
from vop_jax.serve.server import Limits, make_server


@pytest.fixture(scope="session")
def searcher(films, retriever):  # noqa: F811
    return open_searcher(films[1], retriever=retriever)


@pytest.fixture(scope="session")
def serve(searcher):
    """Makes a client of an app with these settings."""
    with contextlib.ExitStack() as stack:

        def start(indexes=None, **settings):
            app = make_app(indexes or {"films": searcher}, Settings(workers=1, **settings))
            app.state.services.executor.start = lambda: None  # decoders start when needed
            client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
            return stack.enter_context(client)

        yield start


@pytest.fixture(scope="session")
def client(serve):
    return serve()


@contextlib.contextmanager
def served(app, **limits):
    """(port, server) of an app that runs in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = make_server(app, Limits(**limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield listening.getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
