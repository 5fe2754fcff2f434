"""Memory that a process has freed is used again, not asked of the system anew."""

import ctypes
import subprocess
import sys

import pytest

from tests import runs
from vop_jax import heap

FAULTS = """
import resource, sys
from vop_jax import heap

if sys.argv[1] == "kept":
    heap.keep_freed()
import jax
import jax.numpy as jnp

program = jax.jit(lambda x: jnp.sin(x @ x[:64]).sum())
x = jnp.ones((2**19, 64), jnp.float32)  # 128 MB, and as much for the product
program(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    program(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    """Of a program's later calls, in a process of its own."""
    argv = [sys.executable, "-c", FAULTS, how]
    ended = subprocess.run(argv, env=runs.environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_program_finds_the_memory_of_its_last_call():
    # Until it lies where nothing else comes, the piece is made once or twice more.
    assert page_faults("kept") < page_faults("freed") / 3


@pytest.mark.parametrize(
    ("named", "installed", "answer"),
    [
        ("cpu", ("jax_plugins", "libtpu"), True),
        ("cuda,cpu", (), False),
        ("", (), True),
        ("", ("jax_plugins",), False),
        ("", ("libtpu",), False),
    ],
)
def test_an_accelerators_process_is_left_alone(monkeypatch, named, installed, answer):
    monkeypatch.setenv("JAX_PLATFORMS", named)
    monkeypatch.setattr(heap, "find_spec", lambda name: name in installed)
    asked = []
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Library(asked))
    heap.keep_freed()
    assert bool(asked) == heap.on_cpu() == answer


class Library:
    """A C library that writes down what it is asked."""

    def __init__(self, asked):
        self.mallopt = lambda *option: asked.append(option)


def test_another_c_library_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.keep_freed()
