"""Batches are read and brought to the devices while the step before them runs.

`grain.experimental.device_put` would take this process's rows for the whole batch.
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

AHEAD = 2  # batches on the devices besides those of steps that were started


def prefetch_batches(
    mesh: Mesh, batches: Iterator[Mapping[str, np.ndarray]]
) -> Generator[dict[str, jax.Array], None, None]:
    """This process's rows of batches -> the global batches; a thread reads `AHEAD` batches early.

    An error of the reader is raised after all batches before it. Use `contextlib.closing` where
    the generator may not be read to its end: closing it ends the thread and drops the batches that
    were read ahead.
    """

    def load() -> dict[str, jax.Array] | None:
        batch = next(batches, None)
        return None if batch is None else sharding.to_global(mesh, batch)

    pending: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        try:
            pending.extend(pool.submit(load) for _ in range(AHEAD))
            while (batch := pending.popleft().result()) is not None:
                pending.append(pool.submit(load))
                yield batch
        finally:
            for future in pending:
                future.cancel()


class IdleTimer:
    """Measures how long this process's devices wait for batches; a context manager.

    Steps are started ahead of the devices, so waiting for a batch costs nothing while they still
    have a step to run. The idle time is from the end of the last step until the batch is on the
    devices; a thread waits for both. Devices that wait in a step for another process are busy.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "idle")
        self._step_end: Future[float] | None = None

    def __enter__(self) -> "IdleTimer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def next(
        self, batches: Iterator[dict[str, jax.Array]]
    ) -> tuple[dict[str, jax.Array], Callable[[], float]]:
        """(the next batch, a function that waits for it and returns the idle seconds).

        Raises:
            StopIteration: there is no other batch.
        """
        begin, step_end = time.perf_counter(), self._step_end
        batch = next(batches)
        arrival = self._thread.submit(_time_when_ready, batch)

        def idle_seconds() -> float:
            idle_from = begin if step_end is None else max(begin, step_end.result())
            return max(0.0, arrival.result() - idle_from)

        return batch, idle_seconds

    def step_started(self, output: Any) -> None:
        """Notes that a step was started, which computes these arrays."""
        self._step_end = self._thread.submit(_time_when_ready, output)


def _time_when_ready(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()
