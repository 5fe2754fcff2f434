"""Work of decoding processes in tests; they import it by name.

By its name a file crashes its decoder, disappears, or becomes another.
"""

import os
import pathlib
import shutil
import signal

from vop_jax.search import decoder


def plan(path, **options):
    """Takes all memory for one file."""
    if path.endswith("/endless.mp4"):
        raise MemoryError
    return decoder.plan_file(path, **options)


def decode(job):
    """Decodes after something has happened to the file."""
    path = pathlib.Path(job[0].path)
    if path.name == "crash.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif path.name == "rotate.mp4":
        shutil.copy(path.with_name("c.mp4"), path)
    elif path.name == "growing.mp4":
        with open(path, "ab") as file:
            file.write(b"more")
    elif path.name == "vanishing.mp4":
        path.unlink()
    return decoder.decode_job(job)
