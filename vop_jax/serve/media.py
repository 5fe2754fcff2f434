"""The bytes of indexed videos, and answers that a client has already."""

import mimetypes
import os
from typing import BinaryIO

from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Receive, Scope, Send

from vop_jax.serve.files import displayable, path_of

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
