"""What worker processes are asked to do in tests; they import it by name."""

import os
import signal
import time

import numpy as np

from vop_jax.data.records.encode import encode_clip
from vop_jax.errors import VideoError


def obey(task):
    """Does what the task says."""
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "exit":
        os._exit(3)
    if task.startswith("hang"):
        if mark := task[len("hang ") :]:
            open(mark, "w").close()
        time.sleep(1000)
    if task == "bug":
        raise ZeroDivisionError("of a kind\nthat has two lines")
    if task == "unusable":
        raise VideoError("zero bytes")
    return task, os.getpid()


def group(task):
    """The process group that this is called in."""
    return {"group": np.int64(os.getpgrp())}


def treacherous(clip, preprocessing):
    """`encode_clip`, but for clips of certain names."""
    for what in ("crash", "hang"):
        if what in clip.path:
            obey(what)
    return encode_clip(clip, preprocessing)
