"""What glibc does with the memory that a process frees, for programs that run on a CPU.

XLA allocates the memory of a step in one piece and frees it afterwards. By default glibc gives it
back to the system, which clears every page again for the next step.
"""

import ctypes
import importlib.util
import os

# Parameters of mallopt, see glibc's <malloc.h>.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
BLOCKS = 65_536  # glibc's default of MMAP_MAX


def keep_freed_memory() -> None:
    """Keeps it for the next allocation; call this before threads start.

    The process can grow by one more step, as freed memory may be in pieces. Does nothing where an
    accelerator may compute.
    """
    accelerators = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    if not accelerators or os.environ.get("JAX_PLATFORMS") == "cpu":
        _set({ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1})


def return_large_blocks() -> None:
    """From now on, gives large blocks back to the system at once."""
    _set({MMAP_MAX: BLOCKS})


def _set(options: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries have none
        for option, value in options.items():
            library.mallopt(option, value)
