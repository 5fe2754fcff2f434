"""Worker processes: results in order, whatever happens to one of them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.data import calls
from vop_jax.data.workers import in_processes, in_threads, starting
from vop_jax.errors import VideoError


def outcomes(tasks, workers=2, seconds=30):
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
    begin = time.monotonic()
    found = outcomes(["hang", "a", "b"], seconds=1)
    assert found == ["its decoder took more than 1 s and was stopped", "a", "b"]
    assert time.monotonic() - begin < 60


def test_processes_end_with_an_iterator_that_is_closed():
    results = in_processes(calls.obey, (f"{i}" for i in range(10**9)), 2, seconds=30)
    _, process = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


ORPHANS = """
from tests.data import calls
from vop_jax.data.workers import in_processes
if __name__ == "__main__":
    results = in_processes(calls.obey, ["a", "b", "hang", "hang"], 2, seconds=1000)
    print(next(results)[1], next(results)[1], flush=True)
    next(results)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    command = [sys.executable, str(tmp_path / "orphans.py")]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        children = {int(number) for number in parent.stdout.readline().split()}
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while children and time.monotonic() < deadline:
        children = {pid for pid in children if alive(pid)}
        time.sleep(0.1)
    assert not children


def test_what_signals_the_group_of_a_parent_leaves_them_alone():
    with contextlib.closing(in_processes(calls.obey, ["a"], 1, seconds=30)) as results:
        _, process = next(results)
        assert os.getpgid(process) == process != os.getpgrp()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


STARTS = """
import re
from pathlib import Path
from vop_jax.data.workers import _Worker
if __name__ == "__main__":
    for worker in [_Worker(str, 5.0) for _ in range(2)]:
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
    found = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert found.stdout.split() == ["1", "1"], found.stderr


def test_a_signal_waits_for_the_end_of_a_start():
    """Also one that another thread takes: its handler runs in the main thread."""
    started, done = threading.Event(), False

    def take():
        started.wait()
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=take)
    thread.start()
    with pytest.raises(KeyboardInterrupt), starting():
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
