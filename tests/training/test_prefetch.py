"""Reading ahead: order, errors in their place, no thread that outlives its reader; idle devices."""

import contextlib
import itertools
import threading
import types

import numpy as np
import pytest

from vop_jax.training import prefetch, sharding
from vop_jax.training.prefetch import AHEAD, Idle, placed


def rows(k):
    return {"rows": np.full((8, 2), k)}


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_batches_come_in_order_on_the_mesh(devices, count):
    mesh = sharding.make_mesh(devices)
    found = list(placed(mesh, map(rows, range(count))))
    for k, batch in enumerate(found):
        np.testing.assert_array_equal(batch["rows"], rows(k)["rows"])
        assert batch["rows"].sharding == sharding.batch_sharding(mesh)
    assert len(found) == count and not threads()


def test_the_next_batches_are_read_while_one_is_used_and_no_more():
    read = [threading.Event() for _ in range(20)]

    def source():
        for k in range(20):
            read[k].set()
            yield rows(k)

    with contextlib.closing(placed(sharding.make_mesh(1), source())) as batches:
        for k in range(5):
            next(batches)
            assert read[k + AHEAD].wait(10)  # without the reader asking
            assert threads()
            assert not any(event.is_set() for event in read[k + AHEAD + 1 :])
    assert not threads()


def test_an_error_is_raised_in_its_place():
    def source():
        yield from map(rows, range(3))
        raise OSError("record 3")

    batches = placed(sharding.make_mesh(1), source())
    for k in range(3):
        assert int(next(batches)["rows"][0, 0]) == k
    with pytest.raises(OSError, match="record 3"):
        next(batches)
    assert not threads()


def test_a_reader_that_leaves_early_takes_the_thread_along():
    with (
        pytest.raises(RuntimeError, match="the reader's"),
        contextlib.closing(placed(sharding.make_mesh(1), map(rows, itertools.count()))) as batches,
    ):
        next(batches)
        assert threads()
        raise RuntimeError("the reader's")
    assert not threads()


@pytest.fixture
def clock(monkeypatch):
    """The time, which only the tests move on."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(prefetch, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Output:
    """Of a step that comes to its end when it is told to."""

    def __init__(self):
        self.over = threading.Event()

    def block_until_ready(self):
        assert self.over.wait(10)


def test_before_the_first_step_all_of_a_wait_counts(clock):
    def source():
        clock.now = 5.0
        yield rows(3)

    with Idle() as idle:
        batch, wait = idle.next(source())
        assert batch["rows"][0, 0] == 3 and wait() == 5


def test_a_wait_counts_from_the_end_of_the_step_before(clock):
    output = Output()

    def source():
        clock.now = 2.0
        output.over.set()
        idle._ended.result(10)  # it is noted
        clock.now = 5.0
        yield rows(0)

    with Idle() as idle:
        idle.ran({"loss": output})
        assert idle.next(source())[1]() == 3


def test_a_wait_that_a_step_outlasts_does_not_count(clock):
    output = Output()

    def source():
        clock.now = 5.0
        yield rows(0)

    with Idle() as idle:
        idle.ran({"loss": output})
        _, wait = idle.next(source())
        clock.now = 7.0
        output.over.set()
        assert wait() == 0


def test_where_batches_end_so_does_the_loop():
    with Idle() as idle, pytest.raises(StopIteration):
        idle.next(iter([]))
    assert not [t for t in threading.enumerate() if t.name.startswith("idle")]
