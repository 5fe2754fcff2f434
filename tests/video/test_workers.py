"""Worker processes: results in order, whatever happens to one of them."""

import contextlib
import errno
import os
import signal
import sys
import threading

import pytest

from tests import processes
from tests.data import calls
from vop_jax.errors import VideoError
from vop_jax.video.workers import block_interrupts, in_processes, in_threads


def outcomes(tasks, workers=2, seconds=processes.HANG):
    with contextlib.closing(in_processes(calls.obey, tasks, workers, seconds=seconds)) as results:
        return [str(r) if isinstance(r, VideoError) else r[0] for r in results]


def test_results_come_in_order():
    tasks = [f"task {i}" for i in range(40)]
    assert outcomes(tasks, workers=3) == tasks
    assert outcomes([], workers=2) == []


def test_what_happens_to_one_costs_one():
    tasks = ["a", "crash", "b", "exit", "bug", "unusable", "c"]
    assert outcomes(tasks) == [
        "a",
        "its decoder crashed (SIGSEGV)",
        "b",
        "its decoder crashed (status 3)",
        "not decodable (ZeroDivisionError: of a kind",
        "zero bytes",
        "c",
    ]


def test_one_that_hangs_is_stopped():
    found = outcomes(["hang", "a"], workers=1, seconds=2)
    assert found == ["its decoder took more than 2 s and was stopped", "a"]


def test_the_reason_for_which_no_process_starts_is_raised(monkeypatch):
    def no_memory(process):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", no_memory)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        outcomes(["a"])


def test_processes_end_with_an_iterator_that_is_closed():
    results = in_processes(calls.obey, (f"{i}" for i in range(10**9)), 2, seconds=processes.HANG)
    _, process = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


ORPHANS = """
import sys
from tests.data import calls
from vop_jax.video.workers import in_processes
if __name__ == "__main__":
    tasks = ["a", "b", *(f"hang {mark}" for mark in sys.argv[1:])]
    results = in_processes(calls.obey, tasks, 2, seconds=1000)
    print(next(results)[1], next(results)[1], flush=True)
    next(results)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    marks = [tmp_path / "1", tmp_path / "2"]
    command = [sys.executable, tmp_path / "orphans.py", *marks]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = processes.Process(command, env=env)
    children = [int(number) for number in parent.stdout.readline().split()]
    assert len(children) == 2
    processes.until(lambda: all(mark.exists() for mark in marks), parent)
    parent.send_signal(signal.SIGKILL)
    processes.until(lambda: not any(map(processes.is_alive, children)))


def test_what_signals_the_group_of_a_parent_leaves_them_alone():
    with contextlib.closing(in_processes(calls.obey, ["a"], 1, seconds=processes.HANG)) as results:
        _, process = next(results)
        assert os.getpgid(process) == process != os.getpgrp()


STARTS = """
import re
from pathlib import Path
from vop_jax.video.workers import Worker
if __name__ == "__main__":
    for worker in [Worker(str, 5.0) for _ in range(2)]:
        worker.launch()
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        print(int(re.search(r"SigBlk:\\s*(\\w+)", status)[1], 16) >> 1 & 1)  # signal 2, SIGINT
        worker.stop()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_control_c_never_reaches_a_process(tmp_path):
    """In a new interpreter: the first process starts otherwise than those after it."""
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    found = processes.run([sys.executable, script], env=environment)
    assert found.stdout.split() == ["1", "1"], found.stderr


def test_a_signal_waits_for_the_end_of_a_start():
    """Also one that another thread takes: its handler runs in the main thread."""
    started, done = threading.Event(), False

    def take():
        started.wait()
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=take)
    thread.start()
    with pytest.raises(KeyboardInterrupt), block_interrupts():
        started.set()
        thread.join()
        done = True
    assert done


def test_threads_do_the_same_but_raise_bugs():
    found = list(in_threads(calls.obey, ["a", "unusable", "b"], 2))
    assert found[0][0] == "a" and found[2][0] == "b"
    assert isinstance(found[1], VideoError)
    with pytest.raises(ZeroDivisionError):
        list(in_threads(calls.obey, ["a", "bug"], 2))
