"""Reading ahead: order, errors in their place, no thread that outlives its reader; idle time."""

import contextlib
import itertools
import threading
import types

import numpy as np
import pytest

from vop_jax.training import prefetch, sharding
from vop_jax.training.prefetch import AHEAD, IdleTimer, prefetch_batches


def rows(k):
    return {"rows": np.full((8, 2), k)}


def threads(name="prefetch"):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.mark.parametrize(("devices", "count"), [(1, 0), (1, 1), (1, 7), (8, 2), (8, 7)])
def test_all_batches_come_in_order_on_the_mesh(devices, count):
    mesh = sharding.make_mesh(devices)
    batches = list(prefetch_batches(mesh, map(rows, range(count))))
    for k, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["rows"], rows(k)["rows"])
        assert batch["rows"].sharding == sharding.batch_sharding(mesh)
    assert len(batches) == count and not threads()


def test_two_batches_are_read_ahead_and_no_more():
    read = [threading.Event() for _ in range(20)]

    def source():
        for k in range(20):
            read[k].set()
            yield rows(k)

    with contextlib.closing(prefetch_batches(sharding.make_mesh(1), source())) as batches:
        for k in range(5):
            next(batches)
            assert read[k + AHEAD].wait(10)  # before the caller asks
            assert threads()
            assert not any(event.is_set() for event in read[k + AHEAD + 1 :])
    assert not threads()


def test_errors_end_the_thread():
    def source():
        yield from map(rows, range(3))
        raise OSError("record 3")

    batches = prefetch_batches(sharding.make_mesh(1), source())
    for k in range(3):
        assert int(next(batches)["rows"][0, 0]) == k
    with pytest.raises(OSError, match="record 3"):
        next(batches)
    assert not threads()
    endless = prefetch_batches(sharding.make_mesh(1), map(rows, itertools.count()))
    with pytest.raises(RuntimeError, match="the caller's"), contextlib.closing(endless):
        next(endless)
        assert threads()
        raise RuntimeError("the caller's")
    assert not threads()


@pytest.mark.parametrize(
    ("step", "idle_seconds"),
    [
        ("none", 5),  # before the first step all of a wait counts
        ("ends at 2", 3),
        ("ends at 7", 0),  # the devices were busy all the time
    ],
)
def test_idle_time_is_from_the_end_of_the_last_step_to_the_next_batch(
    monkeypatch, step, idle_seconds
):
    clock, ended = types.SimpleNamespace(now=0.0), threading.Event()
    monkeypatch.setattr(prefetch, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    output = types.SimpleNamespace(block_until_ready=lambda: ended.wait(10))

    def source():
        if step == "ends at 2":
            clock.now = 2.0
            ended.set()
            idle._step_end.result(10)
        clock.now = 5.0
        yield rows(3)

    with IdleTimer() as idle:
        if step != "none":
            idle.step_started({"loss": output})
        batch, wait = idle.next(source())
        assert batch["rows"][0, 0] == 3
        if step == "ends at 7":
            clock.now = 7.0
            ended.set()
        assert wait() == idle_seconds
        with pytest.raises(StopIteration):
            idle.next(iter([]))
    assert not threads("idle")
