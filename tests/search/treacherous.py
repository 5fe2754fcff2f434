"""What decoding processes are asked to do in tests; they import it by name.

By its name a file crashes its decoder, goes away, or becomes another.
"""

import os
import pathlib
import shutil
import signal

from vop_jax.search import decoder


def plan(path, **given):
    """As it should, but for a file that takes all memory."""
    if path.endswith("/endless.mp4"):
        raise MemoryError
    return decoder._plan(path, **given)


def decode(job):
    """As it should, after something has been done to the file."""
    path = pathlib.Path(getattr(job, "path", ""))
    if path.name == "crash.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif path.name == "rotate.mp4" and not (other := path.with_name("rotate-1.mp4")).exists():
        path.rename(other)
        shutil.copy(path.with_name("c.mp4"), path)
        with open(path, "ab") as file:
            file.write(b"another")
    elif path.name == "growing.mp4":
        with open(path, "ab") as file:
            file.write(b"more")
    elif path.name == "vanishing.mp4":
        path.unlink()
    return decoder._decode(job)
