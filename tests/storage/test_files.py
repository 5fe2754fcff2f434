"""Files and folders on a disk: replaced as a whole, locked, copied, hashed, walked."""

import errno
import json
import os
import pathlib
import stat

import numpy as np
import pytest
from safetensors import SafetensorError

from tests import processes
from vop_jax.errors import UserError
from vop_jax.storage import files, tensors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)


def test_written_files_are_readable_and_in_a_new_folder(tmp_path):
    """JSON is indented, and permissions are the usual ones."""
    files.write_json(tmp_path / "new/x", {"a": [1, 2.5, "é"]})
    text = (tmp_path / "new/x").read_text()
    assert json.loads(text) == {"a": [1, 2.5, "é"]} and text.endswith("}\n")
    tensors.save(tmp_path / "new/y", {"a": np.zeros(2)}, {})
    (tmp_path / "new/z").write_bytes(b"")
    assert len({stat.S_IMODE(os.stat(tmp_path / "new" / name).st_mode) for name in "xyz"}) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path, large = tmp_path / "x.safetensors", {"w": np.zeros(10_000, np.float32)}
    tensors.save(path, {"w": np.zeros(2)}, {})
    old = path.read_bytes()
    for write in (
        lambda: tensors.save(path, large, {}),
        lambda: files.write_atomic(path, bytes(20_000)),
    ):
        error = pytest.raises((OSError, SafetensorError), match="File too large")
        with processes.file_limit(10_000), error:
            write()
        assert path.read_bytes() == old and names(tmp_path) == [path.name]


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


def test_a_kill_leaves_nothing_in_the_way(tmp_path):
    """Neither a folder, nor a file of an older version."""
    fill(tmp_path / ".a.partial", "half")
    (tmp_path / ".b.partial").write_text("half")
    for name in "ab":
        files.write_atomic(tmp_path / name, b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"
    assert names(tmp_path) == ["a", "b"]


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
