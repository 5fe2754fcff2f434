"""The bytes of indexed videos, and answers that a client has already."""

import mimetypes
import os
import pathlib
import re
import stat
from typing import BinaryIO

from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Receive, Scope, Send

from vop_jax.errors import VideoError
from vop_jax.search.catalog import IndexedFile


class Gone(VideoError):
    """An indexed file that cannot be handed out any more; the message is one line."""


def open_indexed(folder: str, file: IndexedFile) -> BinaryIO:
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


# Not told by their names everywhere.
TYPES = {
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".ogv": "video/ogg",
    ".ts": "video/mp2t",
}


class VideoResponse(FileResponse):
    """An open file, whole or the ranges that are asked for; closed when it is sent."""

    def __init__(self, file: BinaryIO, name: str):
        suffix = os.path.splitext(name)[1].lower()
        kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0] or ""
        # Whatever it is called, no browser shall run it.
        safe = kind.startswith("video/")
        super().__init__(
            path_of(file),
            media_type=kind if safe else "application/octet-stream",
            filename=displayable(os.path.basename(name)),
            stat_result=os.fstat(file.fileno()),
            content_disposition_type="inline" if safe else "attachment",
            headers={"Cache-Control": "private, no-cache"},
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        with self._file:
            if known := not_modified(self, scope):
                await known(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)


def not_modified(response: Response, scope: Scope) -> Response | None:
    """What is answered where the client has a response already; None where it has not.

    Args:
        response: with the header ETag.
    """
    if StaticFiles().is_not_modified(response.headers, Headers(scope=scope)):
        return NotModifiedResponse(response.headers)
    return None
