"""Decoders in processes of their own: one that crashes, hangs or swells costs its request alone."""

import contextlib
import functools
import pathlib
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from absl import logging

from vop_jax.errors import VideoError
from vop_jax.video.workers import in_processes

MEMORY = 2 << 30  # bytes that a process may take, beyond its libraries
ENDING = 0.3  # seconds that the processes have when the server ends
RETRY = 1.0  # seconds before a process that could not start is tried again


class Busy(Exception):
    """Not now: too much is waiting already, or no process can start; to be tried again later."""


class Sandbox:
    """Some processes that call functions, one request at a time each.

    Args:
        workers: processes.
        seconds: that a call may take.
        memory: bytes that a process may take, beyond its libraries.
        waiting: calls that may wait; more are refused.
    """

    def __init__(self, workers: int, *, seconds: float, memory: int = MEMORY, waiting: int = 256):
        self._seconds, self._memory = seconds, memory
        self._todo: queue.Queue = queue.Queue(waiting)
        self._closing = threading.Event()
        self._up: set[int] = set()  # threads whose process has started
        self._threads = [
            threading.Thread(target=self._work, name=f"sandbox-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable, *arguments: Any) -> Future:
        """`call(*arguments)`, importable and picklable; what goes wrong with it is a VideoError.

        Raises:
            Busy: there is a queue already.
        """
        future: Future = Future()
        try:
            self._todo.put_nowait((future, (self._memory, call, arguments)))
        except queue.Full:
            raise Busy from None
        return future

    def close(self) -> None:
        """Ends the processes; what waits is cancelled."""
        self._closing.set()
        for future in self._waiting():
            future.cancel()
        for _ in self._threads:
            self._todo.put((None, None))
        deadline = time.monotonic() + ENDING
        for thread in self._threads:  # what is busy ends with this process
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        """One process' thread."""
        while True:
            current: list[Future] = []
            try:
                for result in in_processes(
                    _limited, self._tasks(current), 1, seconds=self._seconds
                ):
                    future = current.pop()
                    if isinstance(result, VideoError):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
                return
            except Exception:  # its process could not start: perhaps a later one can
                logging.exception("a decoding process")
                self._up.discard(threading.get_ident())
                stranded = [] if self._up else self._waiting()
                started = [f for f in stranded if f.set_running_or_notify_cancel()]
                for future in (*current, *started):
                    future.set_exception(Busy("no decoder could be started; try again"))
            if self._closing.wait(RETRY):
                return

    def _waiting(self) -> Iterator[Future]:
        """Takes what waits out of the queue; the ends that `close` puts there stay."""
        with contextlib.suppress(queue.Empty):
            for _ in range(self._todo.qsize()):
                future, task = self._todo.get_nowait()
                if future is not None:
                    yield future
                else:
                    self._todo.put((future, task))

    def _tasks(self, current: list[Future]) -> Iterator[tuple]:
        self._up.add(threading.get_ident())  # before it is asked for a task there is a process
        while True:
            future, task = self._todo.get()
            if future is None:
                return
            if future.set_running_or_notify_cancel():
                current.append(future)
                yield task


def _limited(task: tuple[int, Callable, tuple]) -> Any:
    memory, call, arguments = task
    _limit(memory)
    try:
        return call(*arguments)
    except VideoError:
        raise
    except MemoryError:
        raise VideoError("decoding it takes too much memory") from None
    except Exception:  # for the log; who sent the file learns nothing of our inside
        logging.exception("a decoder failed")
        raise VideoError("not decodable") from None


@functools.cache  # once in the life of a process, when its libraries are loaded
def _limit(memory: int) -> None:
    for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # what is decoded writes no file
        resource.setrlimit(nothing, (0, 0))
    sizes = pathlib.Path("/proc/self/statm")
    if sizes.exists():  # elsewhere than on Linux the limit is not kept anyway
        mapped = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory,) * 2)
