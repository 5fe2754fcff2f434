"""Batches are read and brought to the devices while the step before them runs.

Not `grain.experimental.device_put`: that takes what this process read for the whole batch, of
which it holds some rows only (`sharding.process_rows`).
"""

import collections
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

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
