"""Reading ahead: order, errors in their place, and no thread that outlives its reader."""

import contextlib
import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.training import sharding
from vop_jax.training.prefetch import AHEAD, placed, timed_next


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


class Output:
    """Of a step: whether it is there already."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


@pytest.mark.parametrize(
    "running, waited",
    [
        (None, True),
        ({"loss": Output(True), "grad_norm": Output(True)}, True),
        ({"loss": Output(False), "grad_norm": Output(True)}, False),
    ],
)
def test_a_wait_counts_where_no_step_runs_meanwhile(running, waited):
    def slow():
        time.sleep(0.05)
        yield rows(0)

    batch, seconds = timed_next(slow(), running)
    assert batch["rows"].shape == (8, 2)
    assert seconds >= 0.05 if waited else seconds == 0


def test_what_a_step_put_out_and_was_read_runs_no_more():
    running = jax.jit(lambda x: {"loss": x + 1})(jnp.zeros(()))
    jax.block_until_ready(running)
    assert timed_next(iter([rows(0)]), running)[1] > 0
