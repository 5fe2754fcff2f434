"""The mapped folder: readers, writers, full disks and what a kill leaves."""

import errno
import json
import multiprocessing
import os
import pathlib
import resource

import jax
import numpy as np
import pytest

from tests.search.test_stores import brute_force, drawn
from vop_jax.errors import UserError
from vop_jax.search import exact, mapped, nearest
from vop_jax.search.store import open_store

E = 8


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    opened = open_store(folder, E, write=True)
    yield opened
    opened.close()


def content_of(store):
    ids = store.ids()
    return dict(zip(ids.tolist(), store.get(ids).tolist(), strict=True))


def test_vectors_on_disk_are_those_given(store, folder):
    store.put([1, 2], drawn(2))
    assert (folder / "vectors-0.f32").read_bytes() == drawn(2).astype("<f4").tobytes()


def test_readers_notice_nothing_of_a_compaction(store, folder, monkeypatch):
    monkeypatch.setattr(exact, "SLACK", 0)
    store.put(np.arange(100), drawn(100))
    readers = [open_store(folder, E, write=False) for _ in range(2)]
    before = [reader.search(drawn(3), 7) for reader in readers]
    for seed in range(1, 8):
        store.put(np.arange(100), drawn(100, seed))
        store.delete(np.arange(seed * 10))
    assert json.loads((folder / "head.json").read_text())["generation"] > 2
    for reader, (ids, scores) in zip(readers, before, strict=True):
        again = reader.search(drawn(3), 7)
        np.testing.assert_array_equal(again[0], ids)
        np.testing.assert_array_equal(again[1], scores)
        np.testing.assert_array_equal(reader.get(np.arange(100)), drawn(100))
    with_now = open_store(folder, E, write=False)
    assert with_now.ids().tolist() == list(range(70, 100))
    np.testing.assert_array_equal(with_now.get(np.arange(70, 100)), drawn(100, 7)[70:])


def test_a_reader_is_refreshed(store, folder, monkeypatch):
    """With what was added, replaced and deleted, and through a compaction."""
    monkeypatch.setattr(exact, "SLACK", 0)
    store.put(np.arange(50), drawn(50))
    reader, generations = open_store(folder, E, write=False), set()
    for seed in range(1, 9):
        view = reader._view
        reader.refresh()
        assert (reader._view is view) == (seed == 1)  # nothing is read where nothing was written
        store.put(np.arange(5, 5 + 10 * seed), drawn(10 * seed, seed))
        store.put([5, 6], drawn(2, 100 + seed))
        store.delete([seed, 7])
        reader.refresh()
        assert content_of(reader) == content_of(store)
        np.testing.assert_array_equal(reader.search(drawn(3), 9)[0], store.search(drawn(3), 9)[0])
        generations.add(reader._folder.head.generation)
        store.put([7], drawn(1))
    assert len(generations) > 1


def test_compaction_gives_back_the_room(store, folder, monkeypatch):
    monkeypatch.setattr(exact, "SLACK", 0)
    for seed in range(20):
        store.put(np.arange(100), drawn(100, seed))
    files = sorted(path.name for path in folder.iterdir())
    generation = json.loads((folder / "head.json").read_text())["generation"]
    assert files == sorted(
        ["lock", "head.json", f"vectors-{generation}.f32", f"changes-{generation}.i64"]
    )
    assert (folder / f"vectors-{generation}.f32").stat().st_size <= 2 * 100 * E * 4


def test_a_reader_whose_files_are_compacted_away_while_it_opens(store, folder, monkeypatch):
    store.put([1, 2], drawn(2))
    real, calls = mapped.Folder._read_head, []

    def stale(self, dim):
        head = real(self, dim)
        calls.append(head)
        if len(calls) == 1:  # between the head and the files
            store._folder.compact(np.array([1, 2]), np.array([0, 1]))
        return head

    monkeypatch.setattr(mapped.Folder, "_read_head", stale)
    reader = open_store(folder, E, write=False)
    assert [head.generation for head in calls] == [0, 1]
    np.testing.assert_array_equal(reader.get([1, 2]), drawn(2))


def test_one_writer_many_readers(store, folder):
    with pytest.raises(UserError, match="another process is writing to it"):
        open_store(folder, E, write=True)
    open_store(folder, E, write=False).close()
    store.close()
    open_store(folder, E, write=True).close()


def failing_fsync(monkeypatch, after):
    """The disk is full from the fsync after so many on."""
    real, syncs = os.fsync, []

    def fsync(descriptor):
        syncs.append(descriptor)
        if len(syncs) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("after", range(3))  # vectors, changes, head
def test_a_full_disk_changes_nothing(store, folder, monkeypatch, after):
    store.put([1, 2], drawn(2))
    before, files = content_of(store), {p.name: p.read_bytes() for p in folder.iterdir()}
    failing_fsync(monkeypatch, after)
    for change in (lambda: store.put([2, 3], drawn(2, seed=1)), lambda: store.delete([1])):
        with pytest.raises(UserError) as error:
            change()
        told = f"store {folder}: no space left on the disk; nothing was stored"
        assert str(error.value) == told
        assert content_of(store) == before
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
        failing_fsync(monkeypatch, 0)
    monkeypatch.undo()
    store.put([9], drawn(1, seed=2))
    assert content_of(open_store(folder, E, write=False)) == content_of(store)


def test_a_name_that_cannot_be_synced(store, folder, monkeypatch):
    """The change counts already, but may not outlive a power cut."""
    store.put([1, 2], drawn(2))
    failing_fsync(monkeypatch, 3)
    with pytest.raises(UserError, match="open it again to see whether"):
        store.put([3], drawn(1))
    monkeypatch.undo()
    assert store.ids().tolist() == [1, 2]
    with pytest.raises(UserError, match="open to read only"):
        store.put([4], drawn(1))
    again = open_store(folder, E, write=True)
    assert again.ids().tolist() == [1, 2, 3]
    again.close()


def test_a_write_that_stops_halfway(folder):
    """A limit on the size of files, the nearest to a full disk that needs no rights."""
    process = multiprocessing.get_context("spawn").Process(target=_halfway, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    reader = open_store(folder, E, write=False)
    assert reader.ids().tolist() == [0, 1]
    assert (folder / "vectors-0.f32").stat().st_size == 2 * E * 4


def _halfway(folder):
    store = open_store(folder, E, write=True)
    store.put([0, 1], drawn(2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    with pytest.raises(UserError, match=r"store .*: File too large; nothing was stored"):
        store.put(np.arange(1000), drawn(1000))
    assert len(store) == 2


def test_a_compaction_without_room_leaves_the_dead_rows(store, folder, monkeypatch, caplog):
    monkeypatch.setattr(exact, "SLACK", 0)
    store.put(np.arange(10), drawn(10))
    real = mapped._extend

    def full(path, size, parts):
        if path.name == "vectors-1.f32":
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device", path)
        real(path, size, parts)

    monkeypatch.setattr(mapped, "_extend", full)
    for seed in range(1, 5):
        store.put(np.arange(10), drawn(10, seed))
    assert caplog.text.count("dead rows stay") == 1
    assert not (folder / "vectors-1.f32").exists()
    np.testing.assert_array_equal(store.get(np.arange(10)), drawn(10, 4))
    store.close()
    monkeypatch.setattr(mapped, "_extend", real)
    again = open_store(folder, E, write=True)
    again.put([0], drawn(1))
    assert json.loads((folder / "head.json").read_text())["generation"] == 1
    np.testing.assert_array_equal(again.get(np.arange(1, 10)), drawn(10, 4)[1:])
    again.close()


def test_a_put_that_is_interrupted_ends_the_writing(store, folder, monkeypatch):
    """After Ctrl-C nobody knows whether the change counts, until the store is read again."""
    store.put([1], drawn(1))
    real = pathlib.Path.replace

    def interrupted(self, target):
        real(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put([2], drawn(1, seed=1))
    monkeypatch.undo()
    with pytest.raises(UserError, match="open to read only"):
        store.put([3], drawn(1, seed=2))
    again = open_store(folder, E, write=True)
    assert again.ids().tolist() == [1, 2]
    again.close()


def test_what_a_kill_left_is_passed_over(store, folder):
    store.put([1, 2], drawn(2))
    store.close()
    for name in ("vectors-0.f32", "changes-0.i64"):
        with open(folder / name, "ab") as file:
            file.write(b"garbage")
    (folder / "vectors-1.f32").write_bytes(b"a compaction's")
    (folder / "head.json.partial").write_bytes(b"{")
    assert open_store(folder, E, write=False).ids().tolist() == [1, 2]
    assert (folder / "vectors-1.f32").exists()  # a reader touches nothing
    again = open_store(folder, E, write=True)
    again.put([3], drawn(1, seed=1))
    np.testing.assert_array_equal(again.get([1, 2, 3]), [*drawn(2), *drawn(1, seed=1)])
    assert {path.name for path in folder.iterdir()} == {
        "lock",
        "head.json",
        "vectors-0.f32",
        "changes-0.i64",
    }
    again.close()


def test_a_reader_needs_no_right_to_write(store, folder):
    store.put([1], drawn(1))
    store.close()
    (folder / "lock").unlink()
    before = sorted(folder.iterdir())
    open_store(folder, E, write=False).search(drawn(1), 1)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("head.json", b'{"version": 2, "dim": 8}', "version 2; this program reads version 1"),
        ("head.json", b"{", "not the head of a vector store; damaged"),
        ("head.json", b"[]", "not the head of a vector store; damaged"),
        ("head.json", b'{"version": 1, "dim": 8}', "not the head of a vector store; damaged"),
        ("vectors-0.f32", b"", "shorter than head.json says; damaged"),
        ("changes-0.i64", b"1234", "shorter than head.json says; damaged"),
        ("vectors-0.f32", None, "files that head.json names are missing"),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_damage_is_told(store, folder, name, content, says, write):
    store.put([1], drawn(1))
    store.close()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        open_store(folder, E, write=write)


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("")
    for write, says in ((True, "File exists"), (False, "no vector store")):
        with pytest.raises(UserError, match=says):
            open_store(tmp_path / "file", E, write=write)


@pytest.mark.parametrize("few", [0, 2**14])
def test_queries_in_blocks(store, monkeypatch, few):
    monkeypatch.setattr(nearest, "SCORES", 250)  # two queries
    monkeypatch.setattr(nearest, "FEW", few)
    ids = np.random.default_rng(0).permutation(100)
    store.put(ids, drawn(100))
    content = dict(zip(ids.tolist(), drawn(100), strict=True))
    queries = drawn(5, seed=1)
    for allowed in (None, range(0, 100, 3)):
        listed = None if allowed is None else np.array(allowed)
        expected, best = brute_force(content, queries, 9, allowed)
        found, scores = store.search(queries, 9, listed)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores, best, atol=1e-6)


def test_equal_vectors_tie_wherever_they_lie(store, monkeypatch):
    """BLAS sums the last rows of a block in another order."""
    wide = drawn(1, width=E) / 3
    rows = np.repeat(wide, 1003, axis=0)
    monkeypatch.setattr(nearest, "FEW", 0)
    store.put(np.random.default_rng(0).permutation(1003), rows)
    assert store.search(drawn(1, seed=1), 1003)[0][0].tolist() == list(range(1003))
    monkeypatch.setattr(nearest, "TIED", 10)
    found = store.search(drawn(1, seed=1), 5)[0][0]
    assert found.tolist() == list(range(5))


def test_on_a_device(store, monkeypatch):
    """The path of GPUs and TPUs, here on the CPU's device."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ids = np.random.default_rng(0).permutation(100)
    store.put(ids, drawn(100))
    store.delete(ids[:10])
    content = dict(zip(ids[10:].tolist(), drawn(100)[10:], strict=True))
    queries = drawn(5, seed=1)
    for allowed in (None, range(0, 100, 3), [3], []):
        for k in (1, 7, 120):
            listed = None if allowed is None else np.array(allowed, np.int64)
            expected, best = brute_force(content, queries, k, allowed)
            found, scores = store.search(queries, k, listed)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_allclose(scores, best, atol=1e-6)
    placed = store._view.placed
    assert isinstance(placed, jax.Array) and placed.shape == (90, E)
    assert store._view.placed is placed
    store.put([500], 9 * queries[:1])
    assert store.search(queries[:1], 1)[0].tolist() == [[500]]


def test_what_does_not_fit_on_the_device_is_searched_on_the_host(store, monkeypatch, caplog):
    class Small:
        def memory_stats(self):
            return {"bytes_limit": 4000, "bytes_in_use": 0}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Small()])
    store.put(np.arange(101), drawn(101))
    found, _ = store.search(drawn(101)[:2] * 5, 3)
    expected, _ = brute_force(dict(enumerate(drawn(101))), drawn(101)[:2] * 5, 3)
    np.testing.assert_array_equal(found, expected)
    store.search(drawn(1), 1)
    assert caplog.text.count("do not fit") == 1
