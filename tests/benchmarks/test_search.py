"""The benchmark of the stores, in small."""

import sys

import pytest

from tests import processes
from tests.runs import ROOT


@pytest.mark.parametrize("option", ["", "--ways"])
def test_the_benchmark_runs(tmp_path, option):
    sizes = ["--rows=300", "--dim=16", "--batch=128", "--repeats=2"]
    command = [sys.executable, "-m", "benchmarks.search", f"--index={tmp_path}/index", *sizes]
    command += [option] if option else []
    done = processes.run(command, cwd=ROOT, check=True)
    assert "| put 300 in batches of 128 |" in done.stdout
    named = "NumPy, all at once" if option else "as brute force finds | yes"
    assert named in done.stdout
