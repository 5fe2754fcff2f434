"""Slow work of the server, off its event loop: model calls, vector searches, decoding processes."""

import asyncio
import functools
import pathlib
import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import anyio
import numpy as np
from absl import logging

from vop_jax.errors import VideoError
from vop_jax.search.searcher import Searcher
from vop_jax.video.workers import Worker

VECTORS, THUMBNAILS = 2048, 512  # entries of the caches
WAITING = 256  # requests that may wait for the model, or for a decoder; more are refused
SEARCHES = 4  # at a time
MEMORY = 2 << 30  # bytes that a decoding process may allocate beyond its libraries


class Busy(Exception):
    """The server cannot take a request now; the client may try again."""


class Cache:
    """The results that were used last, up to a number of them."""

    def __init__(self, size: int):
        self._size = size
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The value of a key, or None."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Adds a value; the one that was used longest ago makes room for it."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)


class Executor:
    """Runs slow calls in threads and in decoding processes; all methods belong to one event loop.

    Requests wait in the loop, not in threads, so that requests that only read files overtake them.
    A decoder that crashes, hangs or needs too much memory fails its own request alone.

    Args:
        workers: decoding processes.
        seconds: time limit of one decoding call.
    """

    def __init__(self, workers: int, *, seconds: float):
        self._workers = [Worker(_call_limited, seconds) for _ in range(workers)]
        self._idle = list(self._workers)
        self._vectors, self._thumbnails = Cache(VECTORS), Cache(THUMBNAILS)
        # One call of the model uses all cores: a second one at once would only take memory.
        self._model, self._search = anyio.CapacityLimiter(1), anyio.CapacityLimiter(SEARCHES)
        self._decoders = anyio.CapacityLimiter(workers)

    async def query_vector(self, searcher: Searcher, text: str) -> np.ndarray:
        """float32 [E], the unit vector of a text."""
        return (await self.query_vectors(searcher, [text]))[0]

    async def query_vectors(self, searcher: Searcher, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E]; the texts that are not in the cache are one batch of the model."""
        cached = {text: self._vectors.get((id(searcher), text)) for text in texts}
        if missing := [text for text, vector in cached.items() if vector is None]:
            new = await self.run_model(searcher.vectors, missing)
            for text, vector in zip(missing, new, strict=True):
                cached[text] = vector
                self._vectors.put((id(searcher), text), vector)
        return np.stack([cached[text] for text in texts])

    async def run_model(self, call: Callable, *arguments: Any) -> Any:
        """The result of a call of the model; calls run one at a time."""
        _check_waiting(self._model)
        return await anyio.to_thread.run_sync(call, *arguments, limiter=self._model)

    async def run_search(self, call: Callable, *arguments: Any) -> Any:
        """The result of a search of vectors; a few run at a time."""
        _check_waiting(self._search)
        return await anyio.to_thread.run_sync(call, *arguments, limiter=self._search)

    async def thumbnail(self, call: Callable, *arguments: Any) -> bytes:
        """The result of `decode`, cached."""
        key = call, *arguments
        if (picture := self._thumbnails.get(key)) is None:
            picture = await self.decode(call, *arguments)
            self._thumbnails.put(key, picture)
        return picture

    async def decode(self, call: Callable, *arguments: Any) -> Any:
        """The result of `call(*arguments)` in a decoding process; both must be picklable.

        Raises:
            VideoError: the call fails, crashes, takes too long or needs too much memory.
            Busy: too many calls wait, or no process can be started.
        """
        borrower = object()
        _check_waiting(self._decoders)
        await self._decoders.acquire_on_behalf_of(borrower)
        # A request that is cancelled leaves its decoder running, and the next one waits for it:
        # killing the process would cost a new start for each picture that a page scrolls past.
        task = asyncio.create_task(self._decode(call, arguments))
        task.add_done_callback(lambda _: self._decoders.release_on_behalf_of(borrower))
        return await asyncio.shield(task)

    async def _decode(self, call: Callable, arguments: tuple) -> Any:
        worker = self._idle.pop()  # there is one: `_decoders` lets as many calls in
        try:
            result = await anyio.to_thread.run_sync(worker.run, (call, arguments))
        except (RuntimeError, OSError) as error:
            logging.error("a decoding process could not start: %s", error)
            raise Busy("no decoder could be started; try again") from None
        finally:
            self._idle.append(worker)
        if isinstance(result, VideoError):
            raise result
        return result

    def waiting(self) -> dict[str, int]:
        """Numbers of requests that wait for the model, a search of vectors, and a decoder."""
        limiters = {"model": self._model, "search": self._search, "decoder": self._decoders}
        return {name: one.statistics().tasks_waiting for name, one in limiters.items()}

    def start(self) -> None:
        """Starts the decoding processes, so that the first requests need not wait for them."""
        for worker in self._idle:
            worker.launch()

    async def close(self) -> None:
        """Ends the decoding processes."""
        for worker in self._workers:
            await anyio.to_thread.run_sync(worker.stop)


def _check_waiting(limiter: anyio.CapacityLimiter) -> None:
    if limiter.statistics().tasks_waiting >= WAITING:
        raise Busy("the server is busy; try again")


def _call_limited(task: tuple[Callable, tuple]) -> Any:
    """Runs in a decoding process, within its limits; any error is a VideoError."""
    call, arguments = task
    _limit_process()
    try:
        return call(*arguments)
    except VideoError:
        raise
    except MemoryError:
        raise VideoError("decoding it takes too much memory") from None
    except Exception:  # for the log alone: the sender of a file learns nothing of the server
        logging.exception("a decoder failed")
        raise VideoError("not decodable") from None


@functools.cache  # once in the life of a process, when its libraries are loaded
def _limit_process() -> None:
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # a decoder writes no file
        resource.setrlimit(limit, (0, 0))
    sizes = pathlib.Path("/proc/self/statm")
    if sizes.exists():  # only Linux enforces the limit
        mapped = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
