"""Many calls at once, results in order: by threads, or by processes that may die.

Decoders are C code fed with files from anywhere. In a process of its own, one that crashes or
never returns costs the clip it was at, and no more.
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
AHEAD = 4  # results kept per worker while an earlier one is waited for; bounds the memory
START = 600.0  # seconds for Python to start and import, before a task's time begins


def in_threads(call: Call, tasks: Iterable[Any], workers: int) -> Generator[Any, None, None]:
    """`call(task)` of each, in order; a VideoError is a result, anything else is raised."""
    with ThreadPoolExecutor(workers) as pool:
        pending: collections.deque[Future] = collections.deque()
        try:
            for task in tasks:
                pending.append(pool.submit(_or_error, call, task))
                if len(pending) > AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _or_error(call: Call, task: Any) -> Any:
    try:
        return call(task)
    except VideoError as error:
        return error


def in_processes(
    call: Call, tasks: Iterable[Any], workers: int, *, seconds: float
) -> Generator[Any, None, None]:
    """`call(task)` of each, in order; whatever goes wrong with a task is a VideoError in its place.

    Args:
        call: importable, with arguments and results that can be pickled.
        seconds: that a task may take; then its process is killed.
    """
    todo = enumerate(tasks)
    pool = [_Worker(call, seconds) for _ in range(workers)]
    done: dict[int, Any] = {}
    following = 0  # the result to hand out next
    left = True
    try:
        for worker in pool:
            worker.launch()
        while True:
            for worker in pool:
                ahead = len(done) + sum(w.task is not None for w in pool)
                if left and worker.task is None and ahead < AHEAD * workers:
                    task = next(todo, None)
                    left = task is not None
                    if task is not None:
                        worker.start(*task)
            busy = [worker for worker in pool if worker.task is not None]
            if not busy:
                return
            _wait(busy)
            for worker in busy:
                finished = worker.poll()
                if finished is not None:
                    done[finished[0]] = finished[1]
            while following in done:
                yield done.pop(following)
                following += 1
    finally:
        for worker in pool:
            worker.stop()


def _wait(busy: list["_Worker"]) -> None:
    """Until one has an answer, has died or is out of time."""
    deadline = min(worker.deadline for worker in busy)
    handles = [h for worker in busy for h in (worker.pipe, worker.process.sentinel)]
    connection.wait(handles, max(0.0, deadline - time.monotonic()))


class _Worker:
    """A process that does one task at a time, replaced when it dies."""

    def __init__(self, call: Call, seconds: float):
        self._call, self._seconds = call, seconds
        self.task: int | None = None
        self.deadline = float("inf")
        self.process: Any = None

    def launch(self) -> None:
        """Starts its process, or another one."""
        context = multiprocessing.get_context("spawn")  # a fork would copy locks held by JAX
        with starting():
            self.pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._call), daemon=True)
            process.start()
            self.process = process
            theirs.close()
        self._ready = False

    def start(self, number: int, task: Any) -> None:
        if self.process is None:  # the last one died; none follows it where no task does
            self.launch()
        self.task = number
        # Loading Python is not the task's time.
        self.deadline = time.monotonic() + self._seconds + (0 if self._ready else START)
        with contextlib.suppress(OSError):  # it died while idle; `poll` sees to it
            self.pipe.send(task)

    def poll(self) -> tuple[int, Any] | None:
        """(number, result) if the task has come to an end."""
        assert self.task is not None
        number = self.task
        try:
            if self.pipe.poll():
                told, result = self.pipe.recv()
                if told == "ready":
                    self._ready = True
                    self.deadline = time.monotonic() + self._seconds
                    return None
                self.task = None
                return number, result
        except (EOFError, OSError):
            pass
        if self.process.is_alive() and time.monotonic() < self.deadline:
            return None
        reason = self._stop_and_say_why()
        if not self._ready:
            raise RuntimeError(f"a decoding process could not start: {reason}")
        self.task, self.process = None, None
        return number, VideoError(reason)

    def _stop_and_say_why(self) -> str:
        self.process.join(0.2)  # a pipe closes a little before its process ends
        if self.process.is_alive():
            self.stop()
            return f"its decoder took more than {self._seconds:g} s and was stopped"
        code = self.process.exitcode or 0
        self.stop()
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"its decoder crashed ({name})"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()


def _serve(pipe: connection.Connection, call: Call) -> None:
    """The worker's side: until the other end closes."""
    stand_apart()
    pipe.send(("ready", None))
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = call(task)
        except VideoError as error:
            result = error
        except Exception as error:  # a clip is skipped for it, by name
            result = VideoError(f"not decodable ({type(error).__name__}: {error})".splitlines()[0])
        try:
            pipe.send(("result", result))
        except OSError:
            return


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Around the start of children: from their first moment on Ctrl-C is their parent's.

    And the parent heeds it when they have started: half of a start leaves a child that complains.
    """
    # What the first start would start, too, lets it through again when it runs.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came: list[int] = []  # another thread may have taken it; handlers run in the main one
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None  # one of C cannot be put back
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)


def stand_apart() -> None:
    """Of a child: what signals its parent's process group is the parent's to handle.

    A Ctrl-C at a terminal goes to the whole group, as does what some schedulers send. Nor does it
    outlive its parent, which may be killed.
    """
    os.setpgrp()
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()


def _die_with(parent: int) -> None:
    """Ends this process soon after a parent that was killed, even from within a decoder."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
