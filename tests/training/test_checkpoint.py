"""Damaged checkpoints: a run continues from the one before and says so, or stops with one line."""

import contextlib
import shutil
import threading

import jax
import jax.numpy as jnp
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
    return jax.tree.map(jnp.asarray, TrainState(np.int32(step), params, (params, np.int32(step))))


def save(workdir, *steps):
    with contextlib.closing(Checkpoints(workdir, keep=2)) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), META)
            checkpoints.wait()
    return workdir


def check(meta):
    """As that of the CLIP: a damaged meta must not pass for another run's."""
    assert meta == META


def restore(workdir):
    with contextlib.closing(Checkpoints(workdir, keep=2)) as checkpoints:
        state, _ = checkpoints.restore(state_of(0), check)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(int(state.step)))
    return int(state.step)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save(tmp_path_factory.mktemp("original"), 2, 4)


@pytest.fixture
def saved(original, tmp_path):
    """A workdir with the checkpoints 2 and 4."""
    return shutil.copytree(original, tmp_path / "run")


def test_any_file_of_the_newest_checkpoint_may_be_damaged(original, tmp_path, caplog):
    newest = original / "checkpoints/4"
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    assert all(any(name.startswith(needed) for name in names) for needed in NEEDED)
    # Every file once, every damage on several files.
    for number, (how, damage) in enumerate(DAMAGES.items()):
        for name in names[number % 2 :: 2] if how != "flipped" else names:
            workdir = shutil.copytree(original, tmp_path / "run")
            path = workdir / "checkpoints/4" / name
            content = path.read_bytes()
            path.unlink() if damage is None else path.write_bytes(damage(content))
            caplog.clear()
            step = restore(workdir)
            aside = (workdir / "checkpoints/4.damaged").exists()
            warnings = sum("is damaged" in message for message in caplog.messages)
            assert (step, aside, warnings) in ((4, False, 0), (2, True, 1)), (how, name)
            assert step == 2 or not name.startswith(NEEDED), (how, name)
            shutil.rmtree(workdir)


def test_a_readable_checkpoint_with_other_numbers_is_damaged_and_the_run_goes_on(
    saved, tmp_path, caplog
):
    other = save(tmp_path / "other", 6)
    shutil.rmtree(saved / "checkpoints/4/state")
    shutil.copytree(other / "checkpoints/6/state", saved / "checkpoints/4/state")
    assert restore(saved) == 2
    assert "the checkpoint of step 4 is damaged (state/" in caplog.text
    save(saved, 4, 6)  # the next checkpoints are the newest again
    assert restore(saved) == 6
    names = {path.name for path in (saved / "checkpoints").iterdir()}
    assert names == {"4", "4.damaged", "6"}


def test_without_a_readable_checkpoint_the_run_stops_and_leaves_them(saved):
    for step in (2, 4):
        shutil.rmtree(saved / f"checkpoints/{step}/state")
    with pytest.raises(UserError, match=r"no checkpoint can be read \(step 4: .*; step 2: "):
        restore(saved)
    assert {path.name for path in (saved / "checkpoints").iterdir()} == {"2", "4"}


def test_checkpoints_of_older_versions_have_no_digests(saved):
    (saved / "checkpoints/4/digests.json").unlink()
    assert restore(saved) == 4
    (saved / "checkpoints/4/meta/metadata").write_text("")
    assert restore(saved) == 2


def test_nothing_waits_for_a_folder_that_cannot_be_made(tmp_path):
    checkpoints, before = Checkpoints(tmp_path, keep=2), set(threading.enumerate())
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").touch()
    with contextlib.closing(checkpoints), pytest.raises(NotADirectoryError):
        checkpoints.save(state_of(2), META)
        checkpoints.wait()
    # The process would not end before its threads; those of asyncio are idle.
    names = [thread.name for thread in set(threading.enumerate()) - before]
    assert all(name.startswith("asyncio_") for name in names)


def test_digests_are_written_for_the_step_that_is_saved(tmp_path, monkeypatch):
    written, second_waits = [], threading.Event()

    def write(self):
        assert second_waits.wait(10)
        written.append(self._saving)

    monkeypatch.setattr(Checkpoints, "_write_digests", write)
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        checkpoints.save(state_of(2), META)
        finish = checkpoints._manager.wait_until_finished

        def wait_until_finished():
            second_waits.set()  # the first is still being written
            finish()

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", wait_until_finished)
        checkpoints.save(state_of(4), META)
        checkpoints.wait()
    assert written == [2, 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_that_is_no_sign_of_damage_is_raised(saved, monkeypatch, processes):
    """A whole checkpoint of another state; what a process cannot read others may have read."""
    if processes > 1:
        (saved / "checkpoints/4/digests.json").unlink()

    def read(self, *_):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        raise ValueError("other parameters")

    monkeypatch.setattr(Checkpoints, "_read", read)
    with pytest.raises(UserError, match=r"4: cannot be read .* rename that folder to 4.damaged"):
        restore(saved)
