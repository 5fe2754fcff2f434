"""Milvus' own ways to fail, each told in one line."""

import contextlib
import pathlib
import sys

import numpy as np
import pytest

from tests import processes
from tests.search.shelf import Shelf
from tests.search.stores.test_stores import assert_finds, drawn
from vop_jax.errors import UserError
from vop_jax.search.stores.milvus import MilvusStore

ROOT = pathlib.Path(__file__).parents[3]
E = 8


def opened(uri, dim=E, *, write=True, new=False):
    return MilvusStore(uri, dim, "moments", write=write, new=new)


@pytest.fixture
def installed():
    pytest.importorskip("pymilvus", reason="pip install '.[milvus]'")
    pytest.importorskip("milvus_lite", reason="pip install '.[milvus]'")


@pytest.mark.parametrize("missing", ["pymilvus", "milvus_lite.server_manager"])
def test_without_the_extra(tmp_path, monkeypatch, missing):
    if missing != "pymilvus":
        pytest.importorskip("pymilvus")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r'Milvus.*: .*; pip install -e "\.\[milvus\]"'):
        opened(f"{tmp_path}/a.db")


# A closed port, and an address that nobody answers from (RFC 5737).
@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://192.0.2.1:19530"])
def test_a_server_that_is_down(installed, monkeypatch, address):
    monkeypatch.setattr("vop_jax.search.stores.milvus.CONNECT", 0.5)
    with pytest.raises(UserError, match=rf"^store {address}: .*server unavailable.*$"):
        opened(address)


@pytest.mark.parametrize("address", ["http://", "http://host:port"])
def test_an_address_that_is_none(installed, address):
    with pytest.raises(UserError, match=rf"^store {address}: "):
        opened(address)


def test_a_server_that_stops(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("vop_jax.search.stores.milvus.ANSWER", 1.0)
    shelf = Shelf(tmp_path / "index", E, f"{tmp_path}/a.db")
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(f"{tmp_path}/a.db")
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
    shelf.close()


def test_the_token_comes_from_the_environment(installed, monkeypatch):
    given = {}

    def client(**options):
        given.update(options)
        raise UserError("far enough")

    monkeypatch.setattr("vop_jax.search.stores.milvus._import", lambda: client)
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    with pytest.raises(UserError, match="far enough"):
        opened("https://host:19530#clips", write=False)
    assert (given["uri"], given["token"]) == ("https://host:19530", "secret")


def test_collections_of_one_database(installed, tmp_path):
    """One an index: a second one would take the vectors of the first for what a kill left."""
    uri = f"{tmp_path}/a.db"
    one = Shelf(tmp_path / "one", E, uri)
    two = Shelf(tmp_path / "two", E + 1, f"milvus-lite:{uri}#captions")
    one.add(drawn(1))
    two.add(drawn(2, width=E + 1))
    one.close()
    two.close()
    for collection, what, message in (
        ("other", {"write": False}, "has no collection other"),
        ("captions", {"new": True}, "holds 2 vectors of another index; give an empty one, with"),
        ("captions", {"dim": E}, "collection captions holds vectors of 9 numbers, not of 8"),
    ):
        with pytest.raises(UserError, match=message):
            opened(f"{uri}#{collection}", **({"dim": E + 1} | what))
    store = opened(f"milvus-lite:{uri}", write=False)
    assert len(store) == 1
    store.close()


def test_what_a_kill_left_goes_and_what_is_lost_is_found(installed, tmp_path):
    shelf = Shelf(tmp_path / "index", E, f"{tmp_path}/a.db")
    shelf.add(drawn(3))
    store = shelf.vectors
    with contextlib.suppress(KeyboardInterrupt), shelf.catalog.transaction():
        store.append(shelf.db, drawn(5, seed=1))
        raise KeyboardInterrupt
    store._client.delete(store._collection, ids=[1])
    assert len(store) == 7 and store.lost(shelf.db).tolist() == [1]
    shelf.close()
    again = Shelf(tmp_path / "index", E, f"{tmp_path}/a.db")
    assert again.ids.tolist() == [0, 2] and len(again.vectors) == 2
    assert again.add(drawn(1)) == [3]
    again.close()


def test_an_older_milvus_lite_kept_a_file(installed, tmp_path):
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    with pytest.raises(UserError, match="is a file; Milvus Lite 3 keeps a folder"):
        opened(f"{tmp_path}/old.db", write=False)


def test_one_process_at_a_time_and_quietly(installed, tmp_path):
    uri = f"milvus-lite:{tmp_path}/deeper/vectors"
    shelf = Shelf(tmp_path / "index", E, uri)
    shelf.add(drawn(1))
    code = (
        "import sys\nfrom vop_jax.errors import UserError\n"
        "from vop_jax.search.stores.milvus import MilvusStore\n"
        "try:\n    store = MilvusStore(sys.argv[1], 8, 'moments', write=True)\n"
        "    len(store); store.search([[0.0] * 8], 1); store.close()\n"
        "except UserError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-W", "always", "-c", code, uri]
    first = processes.run(command, cwd=ROOT, check=True)
    assert first.stdout.splitlines() == [
        f"store {uri}: Milvus Lite cannot open it; only one process at a time may"
    ]
    shelf.close()
    second = processes.run(command, cwd=ROOT, check=True)
    assert first.stderr == second.stderr == second.stdout == ""


def test_many_go_in_several_messages(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("vop_jax.search.stores.milvus.ROWS", 7)
    monkeypatch.setattr("vop_jax.search.stores.milvus.LISTED", 9)
    shelf = Shelf(tmp_path / "index", E, f"{tmp_path}/a.db")
    vectors = drawn(40)
    shelf.add(vectors)
    np.testing.assert_array_equal(shelf.vectors.get(np.arange(40)), vectors)
    assert_finds(shelf.vectors, vectors, vectors, 5, range(0, 40, 2))
    shelf.remove(range(30))
    shelf.catalog.compact()
    assert len(shelf.vectors) == 10 and shelf.ids.tolist() == list(range(30, 40))
    shelf.close()


def test_more_than_milvus_answers(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("vop_jax.search.stores.milvus.MOST", 5)
    shelf = Shelf(tmp_path / "index", E, f"{tmp_path}/a.db")
    shelf.add(drawn(6))
    with pytest.raises(UserError, match="k=6; Milvus finds 5 at most"):
        shelf.vectors.search(drawn(1), 6)
    assert shelf.vectors.search(drawn(1), 5)[0].shape == (1, 5)
    shelf.close()
