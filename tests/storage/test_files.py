"""Files and folders on a disk: replaced as a whole, locked, copied, hashed, walked."""

import errno
import json
import os
import pathlib
import resource
import stat
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors import SafetensorError

from vop_jax.errors import UserError
from vop_jax.storage import files, tensors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)


def test_json_is_indented_and_in_a_new_folder(tmp_path):
    files.write_json(tmp_path / "new/x.json", {"a": [1, 2.5, "é"]})
    text = (tmp_path / "new/x.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5, "é"]} and text.endswith("}\n")


def test_files_have_usual_permissions(tmp_path):
    files.write_atomic(tmp_path / "x", b"")
    tensors.save(tmp_path / "y", {"a": np.zeros(2)}, {})
    (tmp_path / "z").write_bytes(b"")
    assert len({stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in "xyz"}) == 1


@contextmanager
def full_disk():
    """Files cannot grow beyond 10 kB: a write ends half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path, large = tmp_path / "x.safetensors", {"w": np.zeros(10_000, np.float32)}
    tensors.save(path, {"w": np.zeros(2)}, {"version": "old"})
    old = path.read_bytes()
    for write in (
        lambda: tensors.save(path, large, {"version": "new"}),
        lambda: files.write_atomic(path, bytes(20_000)),
    ):
        with full_disk(), pytest.raises((OSError, SafetensorError), match="File too large"):
            write()
        assert path.read_bytes() == old and names(tmp_path) == [path.name]
    tensors.save(path, large, {"version": "new"})
    assert tensors.read_metadata(path)["version"] == "new"


@pytest.mark.parametrize("failure", ["the write", "the last rename"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_stays_after_a_failure(tmp_path, monkeypatch, failure, kind):
    if kind == "file":
        (tmp_path / "x").write_text("old")
    else:
        fill(tmp_path / "x", "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "x") as partial:
        if kind == "file":
            partial.write_text("new")
        else:
            fill(partial, "new")
        if failure == "the write":
            raise KeyboardInterrupt
        monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    content = tmp_path / "x" if kind == "file" else tmp_path / "x/file"
    assert content.read_text() == "old" and names(tmp_path) == ["x"]


def test_a_folder_outlives_a_kill_between_the_renames(tmp_path):
    fill(tmp_path / "f", "old")
    (tmp_path / ".f.partial").mkdir()
    (tmp_path / "f").rename(tmp_path / ".f.partial/replaced")
    with pytest.raises(KeyError), files.replacing(tmp_path / "f"):
        raise KeyError
    assert (tmp_path / "f/file").read_text() == "old"


@pytest.mark.parametrize("leftover", ["a folder", "a file of an older version"])
def test_a_kill_leaves_nothing_in_the_way(tmp_path, leftover):
    if leftover == "a folder":
        fill(tmp_path / ".x.partial", "half")
    else:
        (tmp_path / ".x.partial").write_text("half")
    files.write_atomic(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole" and names(tmp_path) == ["x"]


def test_a_local_file_is_used_where_it_is(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with files.local_copy(tmp_path / "x") as local:
        assert local == os.fspath(tmp_path / "x")
    assert files.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_lock_keeps_others_out(tmp_path, monkeypatch):
    folder, busy = tmp_path / "new", "another run is using it"
    with (
        files.folder_lock(folder, busy, label="--workdir=new"),
        pytest.raises(UserError, match=r"^--workdir=new: another run is using it$"),
        files.folder_lock(folder, busy, label="--workdir=new"),
    ):
        pytest.fail("two processes hold one lock")
    (tmp_path / "file").write_text("")
    why = r"file: not a folder to write records in \(File exists\)"
    with (
        pytest.raises(UserError, match=why),
        files.folder_lock(tmp_path / "file", busy, use="write records in"),
    ):
        pytest.fail("a file is locked as a folder")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(OSError, match="No space left"), files.folder_lock(folder, busy):
        pytest.fail("the disk is full")


def test_a_walk_visits_each_folder_once_in_order(tmp_path):
    for name in ("b/deep", "a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b/file").write_text("")
    (tmp_path / "b/deep/circle").symlink_to(tmp_path / "b")
    visited = {folder: list(names) for folder, _, names in files.walk(tmp_path)}
    assert visited == {"": [], "a": [], "b": ["file"], "b/deep": []}
    assert list(visited) == ["", "a", "b", "b/deep"]
