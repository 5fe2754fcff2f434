"""Many calls at once, results in order: in threads, or in processes that may crash.

Decoders are C code that reads files from anywhere. In a process of its own, a decoder that crashes
or never returns costs one clip and no more.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection, resource_tracker
from typing import Any

from vop_jax.errors import VideoError

Call = Callable[[Any], Any]
AHEAD = 4  # results per worker that may wait for an earlier one; bounds the memory
START = 600.0  # seconds in which a process must start and import


def in_threads(call: Call, tasks: Iterable[Any], workers: int) -> Generator[Any, None, None]:
    """`call(task)` of each task, in order; a VideoError is a result, other errors are raised."""

    def result_or_error(task: Any) -> Any:
        try:
            return call(task)
        except VideoError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        pending: collections.deque[Future] = collections.deque()
        try:
            for task in tasks:
                pending.append(pool.submit(result_or_error, task))
                if len(pending) > AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def in_processes(
    call: Call, tasks: Iterable[Any], workers: int, *, seconds: float
) -> Generator[Any, None, None]:
    """`call(task)` of each task, in order; any failure of a task is a VideoError in its place.

    Args:
        call: importable; its arguments and results can be pickled.
        seconds: time limit of a task; after that its process is killed.
    """
    numbered = enumerate(tasks)
    pool = [Worker(call, seconds) for _ in range(workers)]
    results: dict[int, Any] = {}
    next_number = 0
    exhausted = False
    try:
        for worker in pool:
            worker.launch()
        while True:
            for worker in pool:
                ahead = len(results) + sum(w.task is not None for w in pool)
                if not exhausted and worker.task is None and ahead < AHEAD * workers:
                    item = next(numbered, None)
                    exhausted = item is None
                    if item is not None:
                        worker.start(*item)
            busy = [worker for worker in pool if worker.task is not None]
            if not busy:
                return
            _wait(busy)
            for worker in busy:
                number = worker.task
                if number is not None and (done := worker.poll()):
                    results[number] = done[0]
            while next_number in results:
                yield results.pop(next_number)
                next_number += 1
    finally:
        for worker in pool:
            worker.stop()


def _wait(busy: list["Worker"]) -> None:
    """Returns when a worker has sent something, has died or is out of time."""
    deadline = min(worker.deadline for worker in busy)
    handles = [h for worker in busy for h in (worker.pipe, worker.process.sentinel)]
    connection.wait(handles, max(0.0, deadline - time.monotonic()))


class Worker:
    """A process that does one task at a time; another one replaces it when it dies.

    Args:
        call: what it does with a task; importable, with arguments and results that can be pickled.
        seconds: time limit of a task; after that the process is killed.

    Attributes:
        task: the number of its task; None while it is idle.
    """

    def __init__(self, call: Call, seconds: float):
        self._call, self._seconds = call, seconds
        self.task: int | None = None
        self.deadline = float("inf")
        self.process: Any = None

    def run(self, task: Any) -> Any:
        """The result of one task; any failure of it is a VideoError.

        Raises:
            OSError, RuntimeError: no process could be started.
        """
        self.start(0, task)
        while (done := self.poll()) is None:
            _wait([self])
        return done[0]

    def launch(self) -> None:
        """Starts the process."""
        context = multiprocessing.get_context("spawn")  # a fork would copy locks held by JAX
        with block_interrupts():
            self.pipe, child_pipe = context.Pipe()
            process = context.Process(target=_serve, args=(child_pipe, self._call), daemon=True)
            process.start()
            self.process = process
            child_pipe.close()
        self._ready = False

    def start(self, number: int, task: Any) -> None:
        if self.process is None or not self.process.is_alive():  # the last one died
            self.stop()
            self.launch()
        self.task = number
        # The start of Python does not count as the task's time.
        self.deadline = time.monotonic() + self._seconds + (0 if self._ready else START)
        with contextlib.suppress(OSError):  # it died while idle: `poll` reports it
            self.pipe.send(task)

    def poll(self) -> tuple[Any] | None:
        """(result,) if the task has ended."""
        try:
            if self.pipe.poll():
                message = self.pipe.recv()
                if message is None:  # the process has started
                    self._ready = True
                    self.deadline = time.monotonic() + self._seconds
                    return None
                self.task = None
                return message
        except (EOFError, OSError):
            pass
        if self.process.is_alive() and time.monotonic() < self.deadline:
            return None
        reason = self._stop_with_reason()
        self.task = None
        if not self._ready:
            raise RuntimeError(f"a decoding process could not start: {reason}")
        return (VideoError(reason),)

    def _stop_with_reason(self) -> str:
        self.process.join(0.2)  # a pipe closes a little before its process ends
        alive, code = self.process.is_alive(), self.process.exitcode or 0
        self.stop()
        if alive:
            return f"its decoder took more than {self._seconds:g} s and was stopped"
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"its decoder crashed ({name})"

    def stop(self) -> None:
        """Ends the process, and its task."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()


def _serve(pipe: connection.Connection, call: Call) -> None:
    """Runs in the child: sends None, then (result,) of each task, until the parent closes."""
    leave_process_group()
    pipe.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                result = call(task)
            except VideoError as error:
                result = error
            except Exception as error:  # skips the clip and names the cause
                reason = f"not decodable ({type(error).__name__}: {error})"
                result = VideoError(reason.splitlines()[0])
            pipe.send((result,))


@contextlib.contextmanager
def block_interrupts() -> Iterator[None]:
    """Around the start of child processes: Ctrl-C is the parent's alone, from their first moment.

    The parent handles it when they have started: a start that is interrupted halfway leaves a
    child that prints a traceback.
    """
    # The first start would also start this process, which unblocks the signal again.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    received: list[int] = []  # another thread may take the signal; handlers run in the main one
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None  # None: one of C stays in place
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if received:
            signal.raise_signal(signal.SIGINT)


def leave_process_group() -> None:
    """In a child: signals to the parent's process group go to the parent alone.

    A terminal sends Ctrl-C to the whole group, and so do some schedulers. The child ends soon
    after a parent that was killed.
    """
    os.setpgrp()
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # also from within a decoder
