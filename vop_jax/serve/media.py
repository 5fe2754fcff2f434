"""The bytes of indexed videos."""

import mimetypes
import os
from typing import BinaryIO

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from vop_jax.serve.files import path_of

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
            filename=os.path.basename(name),
            stat_result=os.fstat(file.fileno()),
            content_disposition_type="inline" if safe else "attachment",
            headers={"Cache-Control": "private, no-cache"},
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        with self._file:
            await super().__call__(scope, receive, send)
