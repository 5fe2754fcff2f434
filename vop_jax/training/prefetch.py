"""Batches are read and brought to the devices while the step before them runs.

Not `grain.experimental.device_put`: that takes what this process read for the whole batch, of
which it holds some rows only (`sharding.process_rows`).
"""

import collections
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vop_jax.training import sharding

AHEAD = 2  # batches on the devices beside the one that a step reads


def placed(
    mesh: Mesh, batches: Iterator[Mapping[str, np.ndarray]], ahead: int = AHEAD
) -> Generator[dict[str, jax.Array], None, None]:
    """This process's rows of batches -> the global batches, by one thread, `ahead` of the reader.

    What reading raises is raised in its place, after all batches before it. Close the generator
    (`contextlib.closing`) where it may not be read to its end: the thread is gone when it is
    closed. Batches read too early are dropped; batch k is a function of the seed and k, so the
    next reader loses nothing.
    """

    def load() -> dict[str, jax.Array] | None:
        batch = next(batches, None)
        return None if batch is None else sharding.to_global(mesh, batch)

    pending: collections.deque[Future] = collections.deque()
    # Leaving waits for the batch that is being read.
    with ThreadPoolExecutor(1, "prefetch") as pool:
        try:
            pending.extend(pool.submit(load) for _ in range(ahead))
            while (batch := pending.popleft().result()) is not None:
                pending.append(pool.submit(load))
                yield batch
        finally:
            for future in pending:
                future.cancel()


def timed_next(
    batches: Iterator[dict[str, jax.Array]], running: Any
) -> tuple[dict[str, jax.Array], float]:
    """The next batch, and for how many seconds the devices stood still for it, at most.

    Steps are started ahead of the devices, so that waiting costs nothing while they still have
    one to run; where they came to its end meanwhile, all of the wait counts.

    Args:
        running: what the step before puts out, arrays; None before the first.

    Raises:
        StopIteration: there is none.
    """
    since = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - since
    busy = not all(array.is_ready() for array in jax.tree.leaves(running))
    return batch, 0.0 if busy else waited
