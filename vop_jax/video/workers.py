"""Many calls at once, results in order: in threads, or in processes that may crash.

Decoders are C code that reads files from anywhere. In a process of its own, a decoder that crashes
or never returns costs one clip and no more.
"""

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
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
# What a process runs, with its end of a pipe.
SERVE = """
import sys
from multiprocessing.connection import Connection
from vop_jax.video.workers import serve
serve(Connection(int(sys.argv[1])))
"""


def in_threads(
    call: Call, tasks: Iterable[Any], workers: int, *, interrupt: Callable[[], None] | None = None
) -> Generator[Any, None, None]:
    """`call(task)` of each task, in order; a VideoError is a result, other errors are raised.

    Args:
        interrupt: ends the calls that run when the iterator is closed or an error is raised.
    """

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
                while len(pending) >= AHEAD * workers or (pending and pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            if interrupt:
                interrupt()


def in_processes(
    call: Call, tasks: Iterable[Any], workers: int, *, seconds: float
) -> Generator[Any, None, None]:
    """`call(task)` of each task, in order; any failure of a task is a VideoError in its place.

    Args:
        call: importable; its arguments and results can be pickled.
        seconds: time limit of a task; after that its process is killed.

    Raises:
        OSError, RuntimeError: no process could be started.
    """
    pool = [Worker(call, seconds) for _ in range(workers)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def run(task: Any) -> Any:
        worker = idle.get()
        try:
            return worker.run(task)
        finally:
            idle.put(worker)

    def kill_all() -> None:
        for worker in pool:
            worker.kill()

    try:
        for worker in pool:
            worker.launch()
            idle.put(worker)
        yield from in_threads(run, tasks, workers, interrupt=kill_all)
    finally:
        for worker in pool:
            worker.stop()


class Worker:
    """A process that does one task at a time; another one replaces it when it dies.

    Args:
        call: what it does with a task; importable, with arguments and results that can be pickled.
        seconds: time limit of a task; after that the process is killed.
    """

    def __init__(self, call: Call, seconds: float):
        self._call, self._seconds = call, seconds
        self._killed = False
        self.process: Any = None

    def launch(self) -> None:
        """Starts the process.

        `multiprocessing` would import the caller's main file there: a script without
        `if __name__ == "__main__"` fails, and one that imports torch waits for it in each process.
        """
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._pipe, child_pipe = multiprocessing.Pipe()
        with child_pipe:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVE, str(child_pipe.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=[child_pipe.fileno()],
                process_group=0,  # a terminal sends Ctrl-C to the group of the parent alone
            )
        with contextlib.suppress(OSError):  # it has died: `run` finds that out
            self._pipe.send(self._call)
        self._ready = False

    def run(self, task: Any) -> Any:
        """The result of a task; any failure of it is a VideoError.

        Raises:
            OSError, RuntimeError: no process could be started.
        """
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.launch()
        if self._killed:  # while this thread launched it
            self.process.kill()
        if not self._ready:  # the start of Python does not count as the task's time
            if self._receive(START) is None:
                raise RuntimeError(f"a decoding process could not start: {self._stop(START)}")
            self._ready = True
        with contextlib.suppress(OSError):  # it has just died: nothing is received
            self._pipe.send(task)
        if (message := self._receive(self._seconds)) is not None:
            return message[0]
        return VideoError(self._stop(self._seconds))

    def _receive(self, seconds: float) -> tuple | None:
        """What the process sends; None if it dies or sends nothing in this time."""
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        return None

    def _stop(self, seconds: float) -> str:
        """Ends the process and returns what went wrong with it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # a pipe closes a little before its process ends
        code = self.process.poll()
        self.stop()
        if code is None:
            return f"its decoder took more than {seconds:g} s and was stopped"
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"its decoder crashed ({name})"

    def kill(self) -> None:
        """Ends the process, and a task that another thread runs in it, for good."""
        self._killed = True
        if self.process is not None:
            self.process.kill()

    def stop(self) -> None:
        """Ends the process while no task runs; another task starts a new one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._pipe.close()


def serve(pipe: connection.Connection) -> None:
    """Runs in the child: receives its call, sends () and then (result,) of each task."""
    die_with_parent()
    with contextlib.suppress(EOFError, OSError):
        call = pipe.recv()
        pipe.send(())
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

    A terminal sends Ctrl-C to the whole group, and so do some schedulers.
    """
    os.setpgrp()
    die_with_parent()


def die_with_parent() -> None:
    """In a child: it ends soon after a parent that was killed."""
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # also from within a decoder
