"""Worker processes: results in order, whatever happens to one of them."""

import errno
import itertools
import os
import signal
import sys
import threading

import pytest

from tests import processes
from tests.data import calls
from vop_jax.errors import VideoError
from vop_jax.video.workers import block_interrupts, in_processes, in_threads


def test_results_come_in_order_and_a_failure_costs_one_task():
    tasks = [f"task {i}" for i in range(20)]
    failing = ["crash", "b", "exit", "bug", "unusable", "c"]
    results = list(in_processes(calls.obey, [*tasks, *failing], 2, seconds=processes.HANG))
    assert [str(r) if isinstance(r, VideoError) else r[0] for r in results] == [
        *tasks,
        "its decoder crashed (SIGSEGV)",
        "b",
        "its decoder crashed (status 3)",
        "not decodable (ZeroDivisionError: of a kind",
        "zero bytes",
        "c",
    ]


def test_the_reason_why_no_process_starts_is_raised(monkeypatch):
    def no_memory(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("vop_jax.video.workers.subprocess.Popen", no_memory)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        list(in_processes(calls.obey, ["a"], 2, seconds=processes.HANG))


def test_a_task_that_hangs_is_stopped_and_processes_end_with_a_closed_iterator():
    tasks = itertools.chain(["hang"], map(str, itertools.count()))
    results = in_processes(calls.obey, tasks, 1, seconds=3)
    assert str(next(results)) == "its decoder took more than 3 s and was stopped"
    _, process = next(results)
    assert os.getpgid(process) == process != os.getpgrp()
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


ORPHANS = """
import os, sys
from tests.data import calls
from vop_jax.video.workers import in_processes
assert __name__ == "__main__", "a process imports the script"
tasks = ["a", "b", *(f"hang {mark}" for mark in sys.argv[1:])]
results = in_processes(calls.obey, tasks, 2, seconds=1000)
children = [next(results)[1], next(results)[1]]
print(*children, *map(os.getpgid, children), flush=True)
next(results)
"""


def test_processes_know_nothing_of_the_script_and_end_with_it(tmp_path):
    """Ctrl-C reaches the script's process group alone."""
    (tmp_path / "orphans.py").write_text(ORPHANS)
    marks = [tmp_path / "1", tmp_path / "2"]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = processes.Process([sys.executable, tmp_path / "orphans.py", *marks], env=env)
    first, second, *groups = [int(number) for number in parent.stdout.readline().split()]
    assert first != second and groups == [first, second]
    processes.until(lambda: all(mark.exists() for mark in marks), parent)
    parent.send_signal(signal.SIGKILL)
    processes.until(lambda: not processes.is_alive(first) and not processes.is_alive(second))


def test_an_interrupt_waits_for_the_end_of_a_start():
    """Also one that another thread receives: its handler runs in the main thread."""
    started, done = threading.Event(), False

    def interrupt():
        started.wait()
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), block_interrupts():
        started.set()
        thread.join()
        done = True
    assert done


def test_threads_do_the_same_but_raise_bugs():
    first, error, last = in_threads(calls.obey, ["a", "unusable", "b"], 2)
    assert first[0] == "a" and isinstance(error, VideoError) and last[0] == "b"
    with pytest.raises(ZeroDivisionError):
        list(in_threads(calls.obey, ["a", "bug"], 2))
