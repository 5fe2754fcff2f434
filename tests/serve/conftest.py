"""A server of a small index, inside the process of the tests."""

import pytest

from tests.search import library
from tests.search.conftest import clip, retriever  # noqa: F401

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from fastapi.testclient import TestClient

from vop_jax.search.searcher import open_searcher
from vop_jax.serve.app import Settings, make_app


@pytest.fixture(scope="session")
def films(tmp_path_factory, retriever):  # noqa: F811
    """(folder, index with moments): to be read only."""
    return library.make_with_captions(tmp_path_factory.mktemp("served"), retriever)


@pytest.fixture(scope="session")
def searcher(films, retriever):  # noqa: F811
    return open_searcher(films[1], retriever=retriever)


@pytest.fixture(scope="session")
def serve(searcher):
    """Makes a client of an app with these settings."""
    clients = []

    def start(indexes=None, **settings):
        app = make_app(indexes or {"films": searcher}, Settings(workers=1, **settings))
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="session")
def client(serve):
    return serve()
