"""Freed memory stays in the process, until large blocks are to go back."""

import platform
import sys

import pytest

from tests import processes, runs

PROGRAM = """
import mmap, resource
from vop_jax.training import malloc

def clear(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * (size << 20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * mmap.PAGESIZE >> 20

malloc.keep_freed_memory()
first, again = clear(100), clear(100)
malloc.return_large_blocks()
clear(300)  # does not fit in what was kept
print(first, again, clear(300))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_blocks_are_cleared_once_or_each_time():
    """In MB of pages."""
    done = processes.run([sys.executable, "-c", PROGRAM], cwd=runs.ROOT, env=runs.environment())
    first, again, returned = map(int, done.stdout.split())
    assert first > 90 and again < 5 and returned > 290
