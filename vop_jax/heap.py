"""The process's memory, as far as the C library is asked about it."""

import ctypes
import os
from importlib.util import find_spec

# Of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """What is freed stays with a process that computes on the CPU; call it before jax starts.

    There XLA takes all the memory of a step in one piece and frees it when the step is done. glibc
    has such a piece from the system and returns it at once, so the system clears it for every step
    anew, page by page: up to a quarter of what the cores do (docs/performance.md). Of other C
    libraries nothing is asked.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and on_cpu():
        mallopt(M_ARENA_MAX, 1)  # those that threads have of their own are too small for it
        mallopt(M_MMAP_MAX, 0)  # large pieces are parts of the heap like small ones
        mallopt(M_TRIM_THRESHOLD, -1)  # whose end is not returned


def on_cpu() -> bool:
    """Whether jax will choose the CPU, as far as it can be told before it does."""
    named = os.environ.get("JAX_PLATFORMS")
    if named:
        return named == "cpu"
    return not any(find_spec(name) for name in ("jax_plugins", "libtpu"))
