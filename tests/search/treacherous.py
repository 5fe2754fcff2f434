"""What decoding processes are asked to do in tests; they import it by name."""

import os
import signal

from vop_jax.search import decoding


def decode(task):
    """As it should, but for files of a certain name."""
    if getattr(task, "path", "").endswith("/crash.mp4"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return decoding._decode(task)
