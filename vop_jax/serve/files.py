"""Files that may be handed out: those that were indexed, inside the indexed folder."""

import os
import pathlib
import re
import stat
from typing import BinaryIO

from vop_jax.errors import VideoError
from vop_jax.search.writing import File


class Gone(VideoError):
    """An indexed file that cannot be handed out any more; the message is one line."""


def open_indexed(folder: str, file: File) -> BinaryIO:
    """Opens an indexed file to read, as it was indexed.

    Raises:
        Gone: see `open_inside`; or another is there now, perhaps by a link to one in the folder
            that was never indexed.
    """
    opened = open_inside(folder, file.path)
    state = os.fstat(opened.fileno())
    if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime):
        opened.close()
        raise Gone("it has changed since it was indexed; index again")
    return opened


def open_inside(folder: str, path: str) -> BinaryIO:
    """Opens a file of a folder to read.

    Links are followed inside the folder alone, and what is opened is no link whoever swaps it
    meanwhile: every step on the way is opened from the one before.

    Args:
        path: relative to the folder.

    Raises:
        Gone: it is not there, leads out of the folder, or is no file.
    """
    root = os.path.realpath(folder)
    real = pathlib.Path(os.path.realpath(os.path.join(root, path)))
    if not real.is_relative_to(root) or real == pathlib.Path(root):
        raise Gone("it leads out of the indexed folder")
    try:
        descriptor = _open_below(root, real.relative_to(root).parts)
    except OSError:
        raise Gone("it is not there any more") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Gone("it is no file any more")
    return os.fdopen(descriptor, "rb")


def _open_below(root: str, parts: tuple[str, ...]) -> int:
    """A descriptor of root/parts, of which none may be a link."""
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        # A pipe in the place of a file would be waited for without O_NONBLOCK.
        kind = os.O_NONBLOCK if last else os.O_DIRECTORY
        try:
            there = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=here)
        finally:
            os.close(here)
        here = there
    return here


def path_of(file: BinaryIO) -> str:
    """A path that leads to an open file, whatever now lies where it was."""
    return f"/dev/fd/{file.fileno()}"


def displayable(name: str) -> str:
    """A name as JSON and headers can hold it: of a file whose name is not UTF-8, a part is shown
    as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)
