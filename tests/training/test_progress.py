"""Lines on how far a loop is, at the times of a clock that the test turns."""

import pytest
from absl import logging

from vop_jax.evaluation import evaluate
from vop_jax.training import sharding
from vop_jax.training.progress import Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_time_left_is_that_of_the_steps_without_compilation():
    clock = Clock()
    progress = Progress("step", 1000, 10, "compiling", clock)
    clock.now = 60
    assert progress.line() == "step 10/1000  compiling  0:01:00 so far"
    progress.advance(11, "loss 2.00")  # compiled
    assert progress.line() == "step 11/1000  loss 2.00  0:01:00 so far"
    clock.now = 100
    progress.advance(31, "loss 1.00")  # 2 s each
    assert progress.line() == "step 31/1000  loss 1.00  0:32:18 left"
    clock.now = 101
    assert progress.line().endswith("0:32:17 left")
    progress.advance(1000)
    assert progress.line() == "step 1000/1000  loss 1.00  0:00:00 left"


def test_the_innermost_of_nested_loops_writes_while_the_main_thread_waits(caplog, monkeypatch):
    logging.set_verbosity(logging.INFO)
    caplog.set_level("INFO", logger="absl")
    outer, inner = Progress("step", 9), Progress("evaluation, video", 9)
    for progress, waits in ((outer, [False, True]), (inner, [False, False, True])):
        monkeypatch.setattr(progress, "_stop", Turns(waits))
    monkeypatch.setattr(Progress, "_active", [outer, inner])
    for progress in (outer, inner):
        progress._run()  # what its thread does
    assert caplog.messages == ["evaluation, video 0/9  0:00:00 so far"] * 2


class Turns:
    """An event that is set after so many waits; none takes time."""

    def __init__(self, waits):
        self._waits = iter(waits)

    def wait(self, seconds):
        assert seconds == 10
        return next(self._waits)


@pytest.mark.parametrize(
    ("devices", "count", "expected"), [(1, 1, 1), (8, 1, 8), (8, 9, 16), (1, 1000, 32)]
)
def test_a_few_clips_are_not_padded_to_a_whole_batch(devices, count, expected):
    assert evaluate.batch_size_for(sharding.make_mesh(devices), count, 32) == expected
