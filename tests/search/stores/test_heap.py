"""The mapped file: readers, writers, full disks and what a kill leaves."""

import contextlib
import errno
import os
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from tests import processes
from tests.search import library
from tests.search.shelf import Shelf
from tests.search.stores.test_stores import assert_finds, drawn
from vop_jax.errors import UserError
from vop_jax.search import catalog
from vop_jax.search.index import Index
from vop_jax.search.stores import heap, top_k

E = 8


@pytest.fixture
def shelf(tmp_path):
    with contextlib.closing(Shelf(tmp_path / "index", E)) as shelf:
        yield shelf


def content_of(shelf):
    ids = shelf.ids
    return dict(zip(ids.tolist(), shelf.vectors.get(ids).tolist(), strict=True))


def test_a_running_search_does_not_notice_a_compaction(shelf):
    shelf.add(drawn(3000))
    assert shelf.heap().read_bytes() == drawn(3000).astype("<f4").tobytes()
    before = shelf.vectors
    answer = before.search(drawn(3), 7)
    shelf.remove(range(100, 3000))
    shelf.catalog.compact()
    assert [path.name[-6:] for path in shelf.directory.glob("*.f32")] == ["-1.f32"]
    assert shelf.heap().stat().st_size == 100 * E * 4
    for one, again in zip(answer, before.search(drawn(3), 7), strict=True):
        np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(before.get(np.arange(3000)), drawn(3000))
    assert_finds(shelf.vectors, drawn(3000)[:100], drawn(3), 7)


def test_a_block_is_read_once_for_its_checksum(shelf, monkeypatch):
    blocks, real = [], heap.HeapSnapshot._sum
    monkeypatch.setattr(
        heap.HeapSnapshot, "_sum", lambda self, block: blocks.append(block) or real(self, block)
    )
    shelf.add(drawn(3000))
    shelf.vectors.get([2000])
    shelf.vectors.search(drawn(1), 3)
    assert sorted(blocks) == [0, 1, 2]
    shelf.add(drawn(1))  # changes the last block
    shelf.vectors.search(drawn(1), 3)
    assert sorted(blocks) == [0, 1, 2, 2]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("medium", ["heap", "half of a heap", "catalog", "compaction"])
def test_a_full_disk_changes_nothing(shelf, monkeypatch, medium):
    shelf.add(drawn(3000))
    shelf.remove(range(2900))
    before, size = content_of(shelf), shelf.heap().stat().st_size
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if medium == "half of a heap":
            stack.enter_context(processes.file_limit(size + 150_000))
        elif medium == "catalog":
            (pages,) = shelf.db.execute("PRAGMA page_count").fetchone()
            shelf.db.execute(f"PRAGMA max_page_count = {pages}")
        else:
            patch.setattr(os, "fsync", full)
        if medium == "compaction":
            shelf.catalog.compact()  # keeps the dead rows
        else:
            message = r"No space left on device.*/index/|\.f32: File too large; nothing was stored"
            with pytest.raises((OSError, UserError), match=message):
                shelf.add(drawn(9000, seed=1))
    assert content_of(shelf) == before and len(shelf.vectors) == 3000
    assert medium == "catalog" or shelf.heap().stat().st_size == size
    shelf.db.execute("PRAGMA max_page_count = 10000000")
    shelf.add(drawn(3, seed=2))
    shelf.catalog.compact()
    assert len(shelf.vectors) == 103
    assert list(content_of(shelf).values())[:100] == list(before.values())
    assert len(Index(shelf.directory).search(drawn(1), 999)[0]) == 103


def test_the_remains_of_a_kill_are_ignored(shelf):
    shelf.add(drawn(2))
    name = shelf.heap()
    shelf.close()
    with open(name, "ab") as file:
        file.write(b"garbage")
    other = name.with_name(name.name.replace("-0.f32", "-1.f32"))
    other.write_bytes(b"a compaction's")
    stranger = name.with_name("0123-moments-0.f32")
    stranger.touch()
    assert len(Index(shelf.directory).search(drawn(1), 9)[0]) == 2
    assert other.exists()  # a reader changes nothing
    with contextlib.closing(Shelf(shelf.directory, E, files=2)) as again:
        again.add(drawn(1, seed=1))
        np.testing.assert_array_equal(again.vectors.get([0, 1, 2]), [*drawn(2), *drawn(1, seed=1)])
        again.catalog.compact()
    assert not other.exists() and stranger.exists()


@contextlib.contextmanager
def without_rights(directory):
    """A folder that nobody may write."""
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
    shelf.add(drawn(2))
    Index(shelf.directory).search(drawn(1), 1)  # imports, for which there may be no right
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        whole = library.copy(shelf.directory, pathlib.Path(place, "whole"))
        before = sorted(path.name for path in whole.iterdir())
        with without_rights(whole):
            index = Index(whole)
            with catalog.reading(whole):
                assert len(index.search(drawn(1), 9)[0]) == 2
                assert sorted(path.name for path in whole.iterdir()) == before
        # A small cache makes SQLite write its journal and the new pages before the commit.
        shelf.db.executescript("PRAGMA cache_size = 1; PRAGMA cache_spill = 1")
        with contextlib.suppress(KeyboardInterrupt), shelf.catalog.transaction():
            shelf.db.execute("DELETE FROM files")
            killed = library.copy(shelf.directory, pathlib.Path(place, "killed"))
            raise KeyboardInterrupt
        with (
            without_rights(killed),
            pytest.raises(UserError, match="a writer was killed here; search it once where it can"),
        ):
            Index(killed)
        (killed / catalog.FILE).chmod(0o644)
        assert len(Index(killed).search(drawn(1), 9)[0]) == 2
        assert sorted(path.name for path in killed.iterdir()) == before


def test_vectors_in_another_folder(tmp_path):
    """Two indexes may share it."""
    shelves = [Shelf(tmp_path / name, E, str(tmp_path / "vectors")) for name in "ab"]
    for seed, shelf in enumerate(shelves):
        shelf.add(drawn(3000, seed))
        shelf.remove(range(2000))
        shelf.catalog.compact()
    for seed, shelf in enumerate(shelves):
        np.testing.assert_array_equal(shelf.vectors.get(shelf.ids), drawn(3000, seed)[2000:])
        shelf.close()
    assert len(list((tmp_path / "vectors").iterdir())) == 2
    (tmp_path / "file").write_text("")
    for uri, message in ((f"{tmp_path}/file", "File exists"), ("s3://bucket", "must be a local")):
        with pytest.raises(UserError, match=rf"store {uri}: .*{message}"):
            Shelf(tmp_path / "c", E, uri)
    assert not list((tmp_path / "c").iterdir())  # no catalog is bound to it


@pytest.mark.parametrize("few", [0, 2**14])
def test_queries_in_blocks(shelf, monkeypatch, few):
    monkeypatch.setattr(top_k, "SCORES", 250)  # two queries
    monkeypatch.setattr(top_k, "FEW", few)
    shelf.add(drawn(100))
    for allowed in (None, range(0, 100, 3)):
        assert_finds(shelf.vectors, drawn(100), drawn(5, seed=1), 9, allowed)


def test_equal_vectors_tie_in_any_place(shelf, monkeypatch):
    """BLAS sums the last rows of a block in another order."""
    monkeypatch.setattr(top_k, "EXACT", 100)
    shelf.add(np.repeat(drawn(1, width=E) / 3, 1003, axis=0))
    for k in (5, 1003):
        assert shelf.vectors.search(drawn(1, seed=1), k)[0][0].tolist() == list(range(k))


def test_on_a_device(shelf, monkeypatch, caplog):
    """The path of GPUs and TPUs, here on the CPU; where vectors do not fit, the host searches."""
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

    class SmallDevice:
        def memory_stats(self):
            return {"bytes_limit": 3000, "bytes_in_use": 0}

    monkeypatch.setattr(jax, "local_devices", lambda: [SmallDevice()])
    shelf.add(drawn(1, seed=2))
    for _ in range(2):
        assert shelf.vectors.search(queries[:1], 1)[0].tolist() == [[100]]
    assert caplog.text.count("do not fit") == 1
