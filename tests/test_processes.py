"""No process outlives its test, however that ends."""

import signal
import sys

import pytest

from tests import processes, runs

# A test whose process has a child in another process group, as readers of videos are.
LEAVES = """
import subprocess, sys
from tests.processes import Process

CHILD = '''
import os, time
os.setpgrp()
print(os.getppid(), os.getpid(), flush=True)
time.sleep(1e6)
'''
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"

def test_that_ends_early():
    process = Process([sys.executable, "-c", PARENT])
    print(process.stdout.readline(), file=sys.__stderr__, flush=True)
    END
"""


@pytest.mark.parametrize(
    ("killed", "workers"), [(False, 0), (True, 1)], ids=["failed", "killed with a worker"]
)
def test_nothing_is_left(tmp_path, killed, workers):
    test = tmp_path / "test_leaves.py"
    test.write_text(LEAVES.replace("END", "process.wait()" if killed else "assert False"))
    plugins = ["-p", "no:cacheprovider", "-p", "tests.processes"]
    command = [sys.executable, "-m", "pytest", "-s", "-n", str(workers), *plugins]
    pytest_of_it = processes.Process([*command, "--rootdir", tmp_path, test], cwd=runs.ROOT)
    pids = [int(pid) for pid in pytest_of_it.stderr.readline().split()]
    assert len(pids) == 2
    if killed:
        assert all(map(processes.is_alive, pids))
        pytest_of_it.send_signal(signal.SIGKILL)
    assert pytest_of_it.wait() == (-signal.SIGKILL if killed else 1)
    processes.until(lambda: not any(map(processes.is_alive, pids)))
