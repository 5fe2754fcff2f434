"""Batches are read and brought to the devices while the step before them runs.

Not `grain.experimental.device_put`: that takes what this process read for the whole batch, of
which it holds some rows only (`sharding.process_rows`).
"""

import collections
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vop_jax.training import sharding

AHEAD = 2  # batches on the devices beside those of steps that were started


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


class Idle:
    """How long this process's devices stand still for batches; enter it, it has a thread.

    Steps are started ahead of the devices, so that waiting for a batch costs nothing while they
    still have one to run. It costs from the end of the step before until the batch is on the
    devices; the thread notes both. Devices that wait in a step for another process are busy.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "idle")
        self._ended: Future[float] | None = None  # when the step before did

    def __enter__(self) -> "Idle":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def next(
        self, batches: Iterator[dict[str, jax.Array]]
    ) -> tuple[dict[str, jax.Array], Callable[[], float]]:
        """The next batch, and what tells the seconds stood still for it, once they are over.

        Raises:
            StopIteration: there is none.
        """
        since, ended = time.perf_counter(), self._ended
        batch = next(batches)
        arrived = self._thread.submit(_when_ready, batch)

        def seconds() -> float:
            begin = since if ended is None else max(since, ended.result())
            return max(0.0, arrived.result() - begin)

        return batch, seconds

    def ran(self, output: Any) -> None:
        """A step was started that puts out these arrays."""
        self._ended = self._thread.submit(_when_ready, output)


def _when_ready(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()
