"""Processes that tests start: they end with their test, however it ends.

Each process has its own session, which includes its children. The session is killed after the
test. If the test's own process dies first, a shell that waits at a pipe kills the session. Workers
of pytest-xdist die with the pytest that started them.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from subprocess import PIPE
from typing import Any

import pytest

HANG = 1800  # seconds after which a process hangs; long, because machines can be busy
GUARD = 'read -r ended || exec "$0" "$@"'  # ends, or kills the session if the test dies first
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that comes when the parent dies
_running: list["Process"] = []


class Process(subprocess.Popen):
    """A process that is killed, with all that it started, at the end of the test."""

    def __init__(self, command: Sequence[Any], **options: Any):
        pipes = {"stdout": PIPE, "stderr": PIPE, "text": True}
        super().__init__(command, **pipes | options, start_new_session=True)
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, sys.executable, __file__, str(self.pid)],
            stdin=PIPE,
            start_new_session=True,
        )
        _running.append(self)

    def wait(self, timeout: float | None = HANG) -> int:
        return super().wait(timeout)

    def communicate(self, input: Any = None, timeout: float | None = HANG) -> tuple[Any, Any]:
        return super().communicate(input, timeout)

    def end(self) -> None:
        """Kills what is left of it."""
        kill_session(self.pid)
        self.wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        self._guard.communicate(b"ended\n")
        _running.remove(self)


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess:
    """Like `subprocess.run`; captures the output as text unless `options` differ."""
    check = options.pop("check", False)
    process = Process(command, **options)
    try:
        out, err = process.communicate()
    finally:
        process.end()
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        assert done.returncode == 0, f"{out}\n{err}"
    return done


def until(condition: Callable[[], Any], *processes: subprocess.Popen) -> None:
    """Waits for a condition; fails if one of the processes ends before."""
    deadline = time.monotonic() + HANG
    while not condition():
        for process in processes:
            if process.poll() is not None:
                output = process.communicate() if process.stderr else ()
                pytest.fail(f"{process.args} ended with status {process.returncode}: {output}")
        assert time.monotonic() < deadline, "the condition stays false"
        time.sleep(0.01)


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond it: the nearest to a full disk that needs no rights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_session(session: int) -> None:
    """Kills all processes of a session."""
    while pids := [pid for pid in _all() if _session_of(pid) == session and is_alive(pid)]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.001)


def _all() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def pytest_configure(config: pytest.Config) -> None:
    """Lets a worker, which may be waiting for a process, die with its pytest."""
    if hasattr(config, "workerinput"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@pytest.fixture(autouse=True)
def ended_processes() -> Iterator[None]:
    """Ends the processes that a test started; those of a module's fixtures go on."""
    before = [*_running]
    yield
    for process in [p for p in _running if p not in before]:
        process.end()


if __name__ == "__main__":
    kill_session(int(sys.argv[1]))
