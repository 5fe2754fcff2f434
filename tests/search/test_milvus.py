"""Milvus' own ways to fail, each told in one line."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.search.test_stores import drawn
from vop_jax.errors import UserError
from vop_jax.search.store import open_store

ROOT = pathlib.Path(__file__).parents[2]
E = 8


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
        open_store(f"{tmp_path}/a.db", E, write=True)


# A closed port, and an address that nobody answers from (RFC 5737).
@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://192.0.2.1:19530"])
def test_a_server_that_is_down(installed, monkeypatch, address):
    monkeypatch.setattr("vop_jax.search.milvus.CONNECT", 0.5)
    with pytest.raises(UserError, match=rf"^store {address}: .*server unavailable.*$"):
        open_store(address, E, write=True)


@pytest.mark.parametrize("address", ["http://", "http://host:port"])
def test_an_address_that_is_none(installed, address):
    with pytest.raises(UserError, match=rf"^store {address}: "):
        open_store(address, E, write=True)


def test_a_server_that_stops(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("vop_jax.search.milvus.ANSWER", 1.0)
    store = open_store(f"{tmp_path}/a.db", E, write=True)
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(f"{tmp_path}/a.db")
    for call in (
        lambda: store.search(drawn(1), 1),
        lambda: store.put([1], drawn(1)),
        lambda: store.ids(),
        lambda: len(store),
    ):
        with pytest.raises(UserError, match=r"^store .*a\.db: "):
            call()
    store.close()


def test_the_token_comes_from_the_environment(installed, monkeypatch):
    given = {}

    def client(**options):
        given.update(options)
        raise UserError("far enough")

    monkeypatch.setattr("vop_jax.search.milvus._import", lambda: client)
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    with pytest.raises(UserError, match="far enough"):
        open_store("https://host:19530#clips", E, write=False)
    assert (given["uri"], given["token"]) == ("https://host:19530", "secret")


def test_collections_of_one_database(installed, tmp_path):
    one = open_store(f"{tmp_path}/a.db", E, write=True)
    two = open_store(f"milvus-lite:{tmp_path}/a.db#captions", E + 1, write=True)
    one.put([1], drawn(1))
    two.put([2], drawn(1, width=E + 1))
    one.close()
    assert two.ids().tolist() == [2]
    with pytest.raises(UserError, match="has no collection other"):
        open_store(f"{tmp_path}/a.db#other", E, write=False)
    two.close()
    again = open_store(f"milvus-lite:{tmp_path}/a.db", E, write=False)
    assert again.ids().tolist() == [1]
    again.close()


def test_a_name_without_db(installed, tmp_path):
    store = open_store(f"milvus-lite:{tmp_path}/deeper/vectors", E, write=True)
    store.put([1], drawn(1))
    assert len(store) == 1
    store.close()


def test_an_older_milvus_lite_kept_a_file(installed, tmp_path):
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    with pytest.raises(UserError, match="is a file; Milvus Lite 3 keeps a folder"):
        open_store(f"{tmp_path}/old.db", E, write=False)


def test_one_process_at_a_time_and_quietly(installed, tmp_path):
    uri = f"{tmp_path}/a.db"
    store = open_store(uri, E, write=True)
    store.put([1], drawn(1))
    code = (
        "import sys\nfrom vop_jax.errors import UserError\n"
        "from vop_jax.search.store import open_store\n"
        "try:\n    store = open_store(sys.argv[1], 8, write=True)\n"
        "    store.ids(); store.search([[0.0] * 8], 1); store.close()\n"
        "except UserError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-W", "always", "-c", code, uri]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert first.stdout.splitlines() == [
        f"store {uri}: Milvus Lite cannot open it; only one process at a time may"
    ]
    store.close()
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert first.stderr == second.stderr == second.stdout == ""


def test_many_go_in_several_messages(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("vop_jax.search.milvus.ROWS", 7)
    monkeypatch.setattr("vop_jax.search.milvus.LISTED", 9)
    store = open_store(f"{tmp_path}/a.db", E, write=True)
    vectors = drawn(40)
    store.put(np.arange(40), vectors)
    np.testing.assert_array_equal(store.get(np.arange(40)), vectors)
    assert store.ids().tolist() == list(range(40))
    allowed = np.arange(0, 40, 2)
    expected = allowed[np.argsort(-(vectors @ vectors[allowed].T), axis=1)[:, :5]]
    np.testing.assert_array_equal(store.search(vectors, 5, allowed)[0], expected)
    store.delete(np.arange(30))
    assert len(store) == 10
    store.close()


def test_more_than_milvus_answers(installed, tmp_path, monkeypatch):
    monkeypatch.setattr("vop_jax.search.milvus.MOST", 5)
    store = open_store(f"{tmp_path}/a.db", E, write=True)
    store.put(np.arange(6), drawn(6))
    with pytest.raises(UserError, match="k=6; Milvus finds 5 at most"):
        store.search(drawn(1), 6)
    assert store.search(drawn(1), 5)[0].shape == (1, 5)
    store.close()
