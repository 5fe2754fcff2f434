"""What requests share: the model, the processes that decode, and what they made last."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import anyio
import numpy as np

from vop_jax.search.searcher import Searcher
from vop_jax.serve.sandbox import Busy, Sandbox

VECTORS, PICTURES = 2048, 512  # that are kept
WAITING = 256  # requests that may wait for the model, or for a decoder; more are refused
SEARCHES = 4  # at a time


class Kept:
    """The results of some calls, those that were asked for last; threads may share it."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """None where it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Forgets what was asked for longest ago, if there are too many."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)


class Work:
    """Runs what is slow off the event loop; made within it or before.

    Requests wait in the loop, not in threads: those that only read files go past them.

    Args:
        sandbox: its processes decode.
    """

    def __init__(self, sandbox: Sandbox):
        self._sandbox = sandbox
        self._vectors, self._pictures = Kept(VECTORS), Kept(PICTURES)
        # One call of the model uses all cores: a second at once would only take memory.
        self._model, self._search = anyio.CapacityLimiter(1), anyio.CapacityLimiter(SEARCHES)

    async def query(self, searcher: Searcher, text: str) -> np.ndarray:
        """float32 [E] of a text; see `Searcher.vector`."""
        key = id(searcher), text

        def embed() -> np.ndarray:
            vector = self._vectors.get(key)
            if vector is None:
                vector = searcher.vector(text)
                self._vectors.put(key, vector)
            return vector

        vector = self._vectors.get(key)
        return await self.model(embed) if vector is None else vector

    async def model(self, call: Callable, *arguments: Any) -> Any:
        """A call of the model, when it is its turn."""
        return await _in_turn(self._model, call, *arguments)

    async def search(self, call: Callable, *arguments: Any) -> Any:
        """A search of vectors, when it is its turn."""
        return await _in_turn(self._search, call, *arguments)

    async def decode(self, call: Callable, *arguments: Any) -> Any:
        """See `Sandbox.submit`."""
        return await asyncio.wrap_future(self._sandbox.submit(call, *arguments))

    async def picture(self, call: Callable, *arguments: Any) -> bytes:
        """The same, of a picture that is kept."""
        key = call, *arguments
        picture = self._pictures.get(key)
        if picture is None:
            picture = await self.decode(call, *arguments)
            self._pictures.put(key, picture)
        return picture


async def _in_turn(limiter: anyio.CapacityLimiter, call: Callable, *arguments: Any) -> Any:
    if limiter.statistics().tasks_waiting >= WAITING:
        raise Busy
    return await anyio.to_thread.run_sync(call, *arguments, limiter=limiter)
