"""The mapped file: readers, writers, full disks and what a kill leaves."""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import sqlite3
import tempfile

import jax
import numpy as np
import pytest

from tests.search.shelf import Shelf
from tests.search.stores.test_stores import assert_finds, brute_force, drawn
from vop_jax.errors import UserError
from vop_jax.search import catalog
from vop_jax.search.index import Index
from vop_jax.search.stores import heap, top_k

E = 8


@pytest.fixture
def shelf(tmp_path):
    with contextlib.closing(Shelf(tmp_path / "index", E)) as made:
        yield made


def content_of(shelf):
    ids = shelf.ids
    return dict(zip(ids.tolist(), shelf.vectors.get(ids).tolist(), strict=True))


def test_vectors_on_disk_are_those_given(shelf):
    shelf.add(drawn(2))
    assert shelf.heap().read_bytes() == drawn(2).astype("<f4").tobytes()


def test_a_search_under_way_notices_nothing_of_a_compaction(shelf):
    shelf.add(drawn(3000))
    before = shelf.vectors
    answer = before.search(drawn(3), 7)
    shelf.remove(range(100, 3000))
    shelf.catalog.compact()
    assert [path.name[-6:] for path in shelf.directory.glob("*.f32")] == ["-1.f32"]
    assert shelf.heap().stat().st_size == 100 * E * 4
    for found, again in zip(answer, before.search(drawn(3), 7), strict=True):
        np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(before.get(np.arange(3000)), drawn(3000))
    assert_finds(shelf.vectors, drawn(3000)[:100], drawn(3), 7)


def test_a_block_is_read_once_for_its_checksum(shelf, monkeypatch):
    sums = []
    real = heap.Rows._sum
    monkeypatch.setattr(heap.Rows, "_sum", lambda self, n: sums.append(n) or real(self, n))
    shelf.add(drawn(3000))
    shelf.vectors.get([2000])
    assert sums == [1]
    shelf.vectors.search(drawn(1), 3)
    assert sorted(sums) == [0, 1, 2]
    shelf.add(drawn(1))  # the last block has another one now
    shelf.vectors.search(drawn(1), 3)
    assert sorted(sums) == [0, 1, 2, 2]


@pytest.mark.parametrize("full", ["heap", "catalog"])
def test_a_full_disk_changes_nothing(shelf, monkeypatch, full):
    shelf.add(drawn(2))
    before, size = content_of(shelf), shelf.heap().stat().st_size

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    if full == "heap":
        monkeypatch.setattr(os, "fsync", fsync)
    else:
        (pages,) = shelf.db.execute("PRAGMA page_count").fetchone()
        shelf.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match=r"No space left on device.*/index/"):
        shelf.add(drawn(2000, seed=1))
    assert content_of(shelf) == before
    assert full == "catalog" or shelf.heap().stat().st_size == size
    monkeypatch.undo()
    shelf.db.execute("PRAGMA max_page_count = 10000000")
    shelf.add(drawn(3, seed=2))
    assert len(Index.open(shelf.directory).search(drawn(1), 9)[0]) == 5


def test_a_write_that_stops_halfway(shelf):
    """A limit on the size of files, the nearest to a full disk that needs no rights."""
    shelf.add(drawn(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"\.f32: File too large; nothing was stored"):
            shelf.add(drawn(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert shelf.ids.tolist() == [0, 1] and shelf.heap().stat().st_size == 2 * E * 4
    assert len(Index.open(shelf.directory).search(drawn(1), 9)[0]) == 2


def test_a_compaction_without_room_leaves_the_dead_rows(shelf, monkeypatch):
    shelf.add(drawn(3000))
    shelf.remove(range(2900))
    before = content_of(shelf)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(heap.Heap, "_write", full)
        shelf.catalog.compact()
    assert content_of(shelf) == before and len(shelf.vectors) == 3000
    shelf.catalog.compact()
    assert list(content_of(shelf).values()) == list(before.values()) and len(shelf.vectors) == 100


def test_what_a_kill_left_is_passed_over(shelf):
    shelf.add(drawn(2))
    name = shelf.heap()
    shelf.close()
    with open(name, "ab") as file:
        file.write(b"garbage")
    other = name.with_name(name.name.replace("-0.f32", "-1.f32"))
    other.write_bytes(b"a compaction's")
    stranger = name.with_name("0123-moments-0.f32")
    stranger.touch()
    assert len(Index.open(shelf.directory).search(drawn(1), 9)[0]) == 2
    assert other.exists()  # a reader touches nothing
    again = Shelf(shelf.directory, E)
    again.add(drawn(1, seed=1))
    np.testing.assert_array_equal(again.vectors.get([0, 1, 2]), [*drawn(2), *drawn(1, seed=1)])
    again.catalog.compact()
    again.close()
    assert not other.exists() and stranger.exists()


def test_a_commit_that_was_killed_is_rolled_back_by_the_next_reader(shelf, tmp_path):
    """Where nothing can be written that is said; the journal is what a kill leaves of a commit."""
    shelf.add(drawn(2))
    path = shelf.directory / catalog.FILE
    old = path.read_bytes()
    shelf.remove([0])
    new = path.read_bytes()
    journal = path.with_name(f"{path.name}-journal")
    pages = [i for i in range(len(old) // 4096) if old[i * 4096 :][:4096] != new[i * 4096 :][:4096]]
    head = bytes.fromhex("d9d505f920a163d7") + len(pages).to_bytes(4, "big") + bytes(4)
    head += (len(old) // 4096).to_bytes(4, "big") + (512).to_bytes(4, "big")
    journal.write_bytes((head + (4096).to_bytes(4, "big")).ljust(512, b"\0"))
    with open(journal, "ab") as file:
        for number in pages:
            page = old[number * 4096 :][:4096]
            total = sum(page[i] for i in range(4096 - 200, 0, -200)) % 2**32
            file.write((number + 1).to_bytes(4, "big") + page + total.to_bytes(4, "big"))
    assert len(Index.open(shelf.directory).search(drawn(1), 9)[0]) == 2
    assert not journal.exists() and path.read_bytes() == old


@contextlib.contextmanager
def without_rights(directory):
    """A folder, readable to all, and nobody's rights."""
    for path in directory.iterdir():
        path.chmod(0o444)
    directory.chmod(0o555)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(0o755)


def test_where_nothing_can_be_written(shelf):
    """A search needs no right to write and leaves no files; a killed commit needs one, once."""
    shelf.add(drawn(1))
    shelf.close()
    Index.open(shelf.directory).search(drawn(1), 1)  # imports; nobody may have no right to these
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        directory = pathlib.Path(shutil.copytree(shelf.directory, f"{place}/index"))
        before = sorted(path.name for path in directory.iterdir())
        with without_rights(directory):
            index = Index.open(directory)
            with catalog.reading(directory):
                assert len(index.search(drawn(1), 1)[0]) == 1
                assert sorted(path.name for path in directory.iterdir()) == before
        # Its first byte says that it is to be rolled back.
        (directory / f"{catalog.FILE}-journal").write_bytes(bytes.fromhex("d9d505f920a163d7"))
        with (
            without_rights(directory),
            pytest.raises(UserError, match="a writer was killed here; search it once where it can"),
        ):
            Index.open(directory)


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="File exists"):
        Shelf(tmp_path / "index", E, str(tmp_path / "file"))


def test_vectors_in_another_folder(tmp_path):
    """Two indexes may share it."""
    made = [Shelf(tmp_path / name, E, str(tmp_path / "vectors")) for name in "ab"]
    for seed, shelf in enumerate(made):
        shelf.add(drawn(3000, seed))
        shelf.remove(range(2000))
        shelf.catalog.compact()
    for seed, shelf in enumerate(made):
        np.testing.assert_array_equal(shelf.vectors.get(shelf.ids), drawn(3000, seed)[2000:])
        shelf.close()
    assert len(list((tmp_path / "vectors").iterdir())) == 2


@pytest.mark.parametrize("few", [0, 2**14])
def test_queries_in_blocks(shelf, monkeypatch, few):
    monkeypatch.setattr(top_k, "SCORES", 250)  # two queries
    monkeypatch.setattr(top_k, "FEW", few)
    shelf.add(drawn(100))
    for allowed in (None, range(0, 100, 3)):
        assert_finds(shelf.vectors, drawn(100), drawn(5, seed=1), 9, allowed)


def test_equal_vectors_tie_wherever_they_lie(shelf, monkeypatch):
    """BLAS sums the last rows of a block in another order."""
    monkeypatch.setattr(top_k, "FEW", 0)
    shelf.add(np.repeat(drawn(1, width=E) / 3, 1003, axis=0))
    assert shelf.vectors.search(drawn(1, seed=1), 1003)[0][0].tolist() == list(range(1003))
    monkeypatch.setattr(top_k, "TIED", 10)
    assert shelf.vectors.search(drawn(1, seed=1), 5)[0][0].tolist() == list(range(5))


def test_on_a_device(shelf, monkeypatch):
    """The path of GPUs and TPUs, here on the CPU's device."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shelf.add(drawn(100))
    queries = drawn(5, seed=1)
    for allowed in (None, range(0, 100, 3), [3], []):
        for k in (1, 7, 120):
            assert_finds(shelf.vectors, drawn(100), queries, k, allowed)
    placed = shelf.vectors._placed
    assert isinstance(placed, jax.Array) and placed.shape == (100, E)
    assert shelf.vectors._placed is placed
    shelf.add(9 * queries[:1])
    assert shelf.vectors.search(queries[:1], 1)[0].tolist() == [[100]]


def test_what_does_not_fit_on_the_device_is_searched_on_the_host(shelf, monkeypatch, caplog):
    class Small:
        def memory_stats(self):
            return {"bytes_limit": 4000, "bytes_in_use": 0}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Small()])
    shelf.add(drawn(101))
    found, _ = shelf.vectors.search(drawn(101)[:2] * 5, 3)
    np.testing.assert_array_equal(found, brute_force(drawn(101), drawn(101)[:2] * 5, 3)[0])
    shelf.vectors.search(drawn(1), 1)
    assert caplog.text.count("do not fit") == 1


def test_an_older_index(tmp_path):
    with sqlite3.connect(tmp_path / catalog.FILE) as db:
        db.execute("CREATE TABLE about (key TEXT, value TEXT)")
        model = '"clip": "/c.safetensors", "clip_fingerprint": "", "clip_name": "", "prompts": ""'
        rest = '"prompts_fingerprint": "", "method": "", "frames": 3, "dim": 8, "stride": 5.0'
        info = f'{{{model}, {rest}, "window": 10.0, "folder": "/films", "store": ""}}'
        db.execute("INSERT INTO about VALUES ('info', ?)", (info,))
        db.execute("PRAGMA user_version = 1")
    db.close()
    for open_it in (Index.open, catalog.stored_info):
        with pytest.raises(UserError) as error:
            open_it(tmp_path)
        assert str(error.value) == (
            f"{tmp_path}: an index of version 1, this program reads version 2; remove it, then: "
            "python -m vop_jax.search index /films --clip=/c.safetensors --window=10.0 "
            f"--stride=5.0 --index={tmp_path}"
        )
