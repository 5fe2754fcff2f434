"""Damaged checkpoints: the one before is used, and that is said; without one it is one line."""

import shutil
import threading
import time

import jax
import numpy as np
import pytest

from vop_jax.errors import UserError
from vop_jax.training.checkpoint import Checkpoints
from vop_jax.training.step import TrainState

META = {"clip_fingerprint": "abc", "steps": 4}
NEEDED = ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/")
DAMAGES = {
    "emptied": lambda content: b"",
    "removed": None,
    "half": lambda content: content[: len(content) // 2],
    "flipped": lambda content: bytes([*content[:-9], content[-9] ^ 1, *content[-8:]]),
}


def state_of(step):
    rng = np.random.default_rng(step)
    params = {"prompts": {name: rng.random((9, 33), np.float32) for name in "ab"}}
    return TrainState(np.int32(step), params, (params, np.int32(step)))


def save(workdir, *steps, meta=META):
    checkpoints = Checkpoints(workdir, keep=2)
    for step in steps:
        checkpoints.save(jax.tree.map(jax.numpy.asarray, state_of(step)), meta)
        checkpoints.wait()
    checkpoints.close()
    return workdir / "checkpoints"


def check(meta):
    """As that of the CLIP: what is damaged is not another run's."""
    assert meta == META


def restore(workdir):
    checkpoints = Checkpoints(workdir, keep=2)
    try:
        state, _ = checkpoints.restore(jax.tree.map(jax.numpy.asarray, state_of(0)), check)
    finally:
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, state_of(int(state.step)))
    return int(state.step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 2, 4)
    return workdir


@pytest.mark.parametrize("how", DAMAGES)
def test_any_file_of_the_newest_may_be_damaged(saved, tmp_path, how, caplog):
    newest, damage = saved / "checkpoints/4", DAMAGES[how]
    names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
    assert all(any(name.startswith(needed) for name in names) for needed in NEEDED)
    for number, name in enumerate(names):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        path = workdir / "checkpoints/4" / name
        content = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage(content))
        caplog.clear()
        step = restore(workdir)
        aside = (workdir / "checkpoints/4.damaged").exists()
        said = sum("is damaged" in message for message in caplog.messages)
        assert (step, aside, said) in ((4, False, 0), (2, True, 1)), name
        if name.startswith(NEEDED):
            assert step == 2, name
        shutil.rmtree(workdir)


def test_numbers_that_are_not_those_saved(saved, tmp_path, caplog):
    """A whole state that orbax reads, but another one."""
    shutil.copytree(saved, tmp_path / "run")
    other = save(tmp_path / "other", 6)
    shutil.rmtree(tmp_path / "run/checkpoints/4/state")
    shutil.copytree(other / "6/state", tmp_path / "run/checkpoints/4/state")
    assert restore(tmp_path / "run") == 2
    assert "the checkpoint of step 4 is damaged (state/" in caplog.text
    # The run goes on from there, and its next checkpoints are the newest again.
    save(tmp_path / "run", 4, 6)
    assert restore(tmp_path / "run") == 6
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"4", "4.damaged", "6"}


def test_no_checkpoint_can_be_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/{step}/state")
    with pytest.raises(UserError, match=r"no checkpoint can be read \(step 4: .*; step 2: "):
        restore(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"2", "4"}  # for people to look at


def test_checkpoints_of_older_versions_have_no_digests(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/checkpoints/4/digests.json").unlink()
    assert restore(tmp_path / "run") == 4
    (tmp_path / "run/checkpoints/4/meta/metadata").write_text("")
    assert restore(tmp_path / "run") == 2


def test_nothing_waits_for_a_folder_that_cannot_be_made(tmp_path):
    checkpoints, before = Checkpoints(tmp_path, keep=2), set(threading.enumerate())
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").touch()
    try:
        with pytest.raises(NotADirectoryError):
            checkpoints.save(jax.tree.map(jax.numpy.asarray, state_of(2)), META)
            checkpoints.wait()
    finally:
        checkpoints.close()
    left = set(threading.enumerate()) - before
    waiting = [thread for thread in left if not thread.name.startswith("asyncio_")]  # idle ones
    assert not waiting  # the process would not end before them


def test_digests_are_written_for_the_step_that_is_saved(tmp_path, monkeypatch):
    written = []

    def slowly(self):
        time.sleep(0.3)
        written.append(self._saving)

    monkeypatch.setattr(Checkpoints, "_write_digests", slowly)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4):  # the second while the first is being written
        checkpoints.save(jax.tree.map(jax.numpy.asarray, state_of(step)), META)
    checkpoints.wait()
    checkpoints.close()
    assert written == [2, 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_says_nothing_about_the_files_is_raised(saved, tmp_path, monkeypatch, processes):
    """A whole checkpoint of another state; what a process cannot read others may have read."""
    shutil.copytree(saved, tmp_path / "run")
    if processes > 1:
        (tmp_path / "run/checkpoints/4/digests.json").unlink()

    def read(self, *_):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        raise ValueError("other parameters")

    monkeypatch.setattr(Checkpoints, "_read", read)
    with pytest.raises(UserError, match=r"4: cannot be read .* rename that folder to 4.damaged"):
        restore(tmp_path / "run")
