"""Milvus' own ways to fail, each reported in one line."""

import contextlib
import pathlib
import sys

import numpy as np
import pytest

from tests import processes
from tests.search.shelf import Shelf
from tests.search.stores.test_stores import assert_finds, drawn
from vop_jax.errors import UserError
from vop_jax.search.index import Index
from vop_jax.search.stores import client, milvus
from vop_jax.search.stores.milvus import MilvusStore

ROOT = pathlib.Path(__file__).parents[3]
E = 8


def opened(uri, dim=E, *, write=True, new=False):
    return MilvusStore(uri, dim, "moments", write=write, new=new)


@pytest.fixture
def installed():
    pytest.importorskip("pymilvus", reason="pip install '.[milvus]'")
    pytest.importorskip("milvus_lite", reason="pip install '.[milvus]'")


# Milvus Lite and a server, instead of all places.
on_milvus = pytest.mark.parametrize(
    "place", ["lite", pytest.param("server", marks=pytest.mark.slow)], indirect=True
)
on_lite = pytest.mark.parametrize("place", ["lite"], indirect=True)


@pytest.fixture
def shelf(uri, tmp_path):
    with contextlib.closing(Shelf(tmp_path / "index", E, uri)) as shelf:
        yield shelf


@pytest.mark.parametrize("missing", ["pymilvus", "milvus_lite.server_manager"])
def test_without_the_extra(tmp_path, monkeypatch, missing):
    if missing != "pymilvus":
        pytest.importorskip("pymilvus", reason="pip install '.[milvus]'")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r'Milvus.*: .*; pip install -e "\.\[milvus\]"'):
        opened(f"{tmp_path}/a.db")


# A closed port, an address that nobody answers from (RFC 5737), and two that are none.
@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:1", "http://192.0.2.1:19530", "http://", "http://host:port"],
)
def test_a_server_that_does_not_answer(installed, tmp_path, monkeypatch, address):
    monkeypatch.setattr(client, "CONNECT", 0.5)
    with pytest.raises(UserError, match=rf"^store {address}: .+$"):
        Shelf(tmp_path, E, address)
    assert not list(tmp_path.iterdir())  # no catalog is bound to it


@on_lite
def test_a_server_that_stops(shelf, uri, monkeypatch):
    from milvus_lite.server_manager import server_manager_instance

    monkeypatch.setattr(milvus, "ANSWER", 1.0)
    server_manager_instance.release_server(uri)
    store = shelf.vectors
    for call in (
        lambda: store.search(drawn(1), 1),
        lambda: shelf.add(drawn(1)),
        lambda: store.lost(shelf.db),
        lambda: store.clean(shelf.db),
        lambda: len(store),
    ):
        with pytest.raises(UserError, match=r"^store .*a\.db: "):
            call()


def test_the_token_comes_from_the_environment(installed, monkeypatch):
    options = {}

    def make_client(**given):
        options.update(given)
        raise UserError("far enough")

    monkeypatch.setattr(client, "_import_client", lambda: make_client)
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    with pytest.raises(UserError, match="far enough"):
        opened("https://host:19530#clips", write=False)
    assert (options["uri"], options["token"]) == ("https://host:19530", "secret")


@on_milvus
def test_collections_of_one_database(uri, tmp_path):
    """Each index has one: a second one would delete the vectors of the first as remains."""
    address, two = uri.partition("#")[0], f"{tmp_path.name}_two"
    shelves = Shelf(tmp_path / "one", E, uri), Shelf(tmp_path / "two", E + 1, f"{address}#{two}")
    for count, shelf in enumerate(shelves, 1):
        shelf.add(drawn(count, width=shelf.info.dim))
        shelf.close()
    for collection, options, message in (
        ("other", {"write": False}, "has no collection other"),
        (two, {"new": True}, "holds 2 vectors of another index; give an empty one, with"),
        (two, {"dim": E}, f"collection {two} holds vectors of 9 numbers, not of 8"),
    ):
        with pytest.raises(UserError, match=message):
            opened(f"{address}#{collection}", **({"dim": E + 1} | options))
    with contextlib.closing(opened(uri, write=False)) as store:
        assert len(store) == 1


def test_a_file_of_the_older_milvus_lite(installed, tmp_path):
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    with pytest.raises(UserError, match="is a file; Milvus Lite 3 keeps a folder"):
        opened(f"{tmp_path}/old.db", write=False)


@on_milvus
def test_remains_of_a_kill_and_lost_vectors(shelf, uri, tmp_path):
    shelf.add(drawn(3))
    store = shelf.vectors
    with contextlib.suppress(KeyboardInterrupt), shelf.catalog.transaction():
        store.append(shelf.db, drawn(5, seed=1))
        raise KeyboardInterrupt
    store._client.delete(store._collection, ids=[1])
    assert len(store) == 7 and store.lost(shelf.db).tolist() == [1]
    shelf.close()
    with contextlib.closing(Shelf(tmp_path / "index", E, uri, files=3)) as again:
        assert again.ids.tolist() == [0, 2] and len(again.vectors) == 2
        assert again.add(drawn(1)) == [3]


def test_one_process_at_a_time_without_noise(installed, tmp_path):
    uri = f"milvus-lite:{tmp_path}/deeper/vectors"
    code = (
        "import sys\n"
        "from vop_jax.errors import UserError\n"
        "from vop_jax.search.stores.milvus import MilvusStore\n"
        "try:\n    store = MilvusStore(sys.argv[1], 8, 'moments', write=True)\n"
        "    len(store); store.search([[0.0] * 8], 1); store.close()\n"
        "except UserError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-W", "always", "-c", code, uri]
    first = processes.run(command, cwd=ROOT, check=True)
    assert first.stderr == first.stdout == ""
    Shelf(tmp_path / "index", E, uri).close()  # Milvus Lite runs until this process ends
    second = processes.run(command, cwd=ROOT, check=True)
    message = f"store {uri}: Milvus Lite cannot open it; only one process at a time may\n"
    assert (second.stdout, second.stderr) == (message, "")


@on_milvus
def test_more_than_one_message_or_answer_holds(shelf, monkeypatch):
    for name, value in (("ROWS", 7), ("LISTED", 9), ("MOST", 11)):
        monkeypatch.setattr(milvus, name, value)
    vectors = drawn(40)
    shelf.add(vectors)
    np.testing.assert_array_equal(shelf.vectors.get(np.arange(40)), vectors)
    with contextlib.closing(Index(shelf.directory)) as index:
        best = np.argsort(-(vectors @ vectors[0]))[:9]
        hits = index.search(vectors[:1], 9)[0]
        assert [hit.path for hit in hits] == [f"{number}.mp4" for number in best]
    for k, allowed in ((5, range(0, 40, 2)), (30, range(40)), (30, None)):
        assert_finds(shelf.vectors, vectors, vectors, k, allowed)
    shelf.remove(range(30))
    shelf.catalog.compact()
    assert len(shelf.vectors) == 10 and shelf.ids.tolist() == list(range(30, 40))
