"""Lines on how far a loop is, at the times of a clock that the test turns."""

from unittest import mock

from absl import logging

from vop_jax.training.progress import Progress


def test_time_left_is_that_of_the_steps_without_compilation():
    clock = mock.Mock(return_value=0.0)
    progress = Progress("step", 1000, 10, "compiling", clock)
    clock.return_value = 60
    assert progress.line() == "step 10/1000  compiling  0:01:00 so far"
    progress.advance(11, "loss 2.00")  # compiled
    assert progress.line() == "step 11/1000  loss 2.00  0:01:00 so far"
    clock.return_value = 100
    progress.advance(31, "loss 1.00")  # 2 s each
    assert progress.line() == "step 31/1000  loss 1.00  0:32:18 left"
    clock.return_value = 101
    assert progress.line().endswith("0:32:17 left")
    progress.advance(1000)
    assert progress.line() == "step 1000/1000  loss 1.00  0:00:00 left"


def test_the_innermost_of_nested_loops_writes_while_the_main_thread_waits(caplog, monkeypatch):
    logging.set_verbosity(logging.INFO)
    caplog.set_level("INFO", logger="absl")
    outer, inner = Progress("step", 9), Progress("evaluation, video", 9)
    for progress, waits in ((outer, [False, True]), (inner, [False, False, True])):
        event = mock.Mock(**{"wait.side_effect": waits})  # set after so many waits
        monkeypatch.setattr(progress, "_stop", event)
    monkeypatch.setattr(Progress, "_active", [outer, inner])
    for progress in (outer, inner):
        progress._run()  # what its thread does
    assert caplog.messages == ["evaluation, video 0/9  0:00:00 so far"] * 2
    assert event.wait.call_args_list == [mock.call(10)] * 3  # seconds
