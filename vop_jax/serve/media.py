"""Video files of the server: indexed ones are opened, decoded and sent; uploads are decoded.

Decoding processes import this file: it loads no jax.
"""

import contextlib
import email.utils
import io
import mimetypes
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Receive, Scope, Send

from vop_jax.errors import UserError, VideoError
from vop_jax.search import sources
from vop_jax.search.catalog import IndexedFile
from vop_jax.storage import remote
from vop_jax.storage.files import is_remote
from vop_jax.video.crops import eval_crop
from vop_jax.video.decode import SegmentReader
from vop_jax.video.frames import read_frame_at
from vop_jax.video.images import decode_picture
from vop_jax.video.moments import FrameSpec, read_segment

THUMBNAIL = 320, 640  # largest width and height
QUALITY = 80  # of its JPEG
PIXELS = 50_000_000  # largest uploaded picture

# Types that Python's own table lacks on some systems.
TYPES = {
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".ogv": "video/ogg",
    ".ts": "video/mp2t",
}

CHANGED = "it has changed since it was indexed; index again"


class FileGone(VideoError):
    """An indexed file that is no longer there, or no longer the same; the message is one line."""


def open_indexed(folder: str, file: IndexedFile) -> BinaryIO:
    """Opens an indexed file for reading, if it is still the file that was indexed.

    Raises:
        FileGone: see `open_inside`; or the file has changed since, perhaps into a link to another
            file of the folder that was never indexed.
    """
    opened = open_inside(*sources.split(folder, file.path))
    state = os.fstat(opened.fileno())
    if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime):
        opened.close()
        raise FileGone(CHANGED)
    return opened


@contextlib.contextmanager
def opened_path(folder: str, file: IndexedFile) -> Iterator[str]:
    """A path or an address of an indexed file, if it is still the file that was indexed.

    Raises:
        FileGone: as `open_indexed`.
    """
    where = sources.locate(os.fspath(folder), file.path)
    if is_remote(where):
        _check_remote(where, file)
        yield where
        return
    with open_indexed(folder, file) as opened:
        yield path_of(opened)


def check_unchanged(folder: str, file: IndexedFile) -> None:
    """Raises FileGone unless an indexed file is still the one that was indexed."""
    with opened_path(folder, file):
        pass


def _check_remote(address: str, file: IndexedFile) -> None:
    try:
        known = remote.describe(address)
    except (OSError, UserError) as error:
        raise FileGone(f"it cannot be read ({error})") from None
    if (known.size, known.mtime) != (file.size, file.mtime):
        raise FileGone(CHANGED)


def open_inside(folder: str, path: str) -> BinaryIO:
    """Opens a file of a folder for reading.

    Links are followed only inside the folder. A link that is swapped in during the call is not
    followed: each step of the path is opened relative to the one before.

    Args:
        path: relative to the folder.

    Raises:
        FileGone: the file does not exist, lies outside of the folder, or is no regular file.
    """
    root = os.path.realpath(folder)
    real = pathlib.Path(os.path.realpath(os.path.join(root, path)))
    if not real.is_relative_to(root) or real == pathlib.Path(root):
        raise FileGone("it leads out of the indexed folder")
    try:
        descriptor = _open_below(root, real.relative_to(root).parts)
    except OSError:
        raise FileGone("it is not there any more") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileGone("it is no file any more")
    return os.fdopen(descriptor, "rb")


def _open_below(root: str, parts: tuple[str, ...]) -> int:
    """A descriptor of root/parts, of which none may be a link."""
    parent = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for i, part in enumerate(parts):
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        kind = os.O_NONBLOCK if i == len(parts) - 1 else os.O_DIRECTORY
        try:
            child = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=parent)
        finally:
            os.close(parent)
        parent = child
    return parent


def path_of(file: BinaryIO) -> str:
    """A path of an open file, valid whatever happens to its name."""
    return f"/dev/fd/{file.fileno()}"


def thumbnail(folder: str, file: IndexedFile, seconds: float) -> bytes:
    """A JPEG of the frame that an indexed video shows at a time.

    Raises:
        VideoError: the file cannot be read, or is gone (`FileGone`).
    """
    with opened_path(folder, file) as path:
        picture = Image.fromarray(read_frame_at(path, seconds))
    picture.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def moment_frames(
    folder: str, file: IndexedFile, spec: FrameSpec, start: float, end: float
) -> tuple[np.ndarray, list[float]]:
    """(uint8 [F, S, S, 3], seconds) of the frames of a segment of an indexed video.

    Raises:
        VideoError: the file cannot be read, or is gone (`FileGone`).
    """
    with opened_path(folder, file) as path:
        return read_segment(path, spec, start, end)


def uploaded_video(path: str, spec: FrameSpec, max_seconds: float) -> np.ndarray:
    """Frames uint8 [F, S, S, 3] of an uploaded file.

    Raises:
        VideoError: it is no video, damaged, or too long.
    """
    times = SegmentReader(path).packet_times()
    if times and times[-1] > max_seconds:
        raise VideoError(f"{times[-1]:.0f} s long; at most {max_seconds:g} s are allowed")
    return read_segment(path, spec)[0]


def uploaded_image(path: str, spec: FrameSpec) -> np.ndarray:
    """Pixels uint8 [S, S, 3] of an uploaded picture.

    Raises:
        VideoError: it is no picture, or too large.
    """
    with open(path, "rb") as file:
        pixels = decode_picture(file, PIXELS)
    return eval_crop(pixels[None], spec.image_size)[0]


def displayable(name: str) -> str:
    """A name that JSON and headers can hold: bytes that are not UTF-8 become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


class VideoResponse(FileResponse):
    """An open file, whole or in the requested ranges; it is closed when it has been sent."""

    def __init__(self, file: BinaryIO, name: str):
        kind, safe = _type_of(name)
        super().__init__(
            path_of(file),
            media_type=kind,
            filename=displayable(os.path.basename(name)),
            stat_result=os.fstat(file.fileno()),
            content_disposition_type="inline" if safe else "attachment",
            headers={"Cache-Control": "private, no-cache"},
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the file, or that the client has it."""
        with self._file:
            if unchanged := not_modified(self, scope):
                await unchanged(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)


class RemoteVideoResponse(StreamingResponse):
    """A remote file, whole or in the requested range, which passes through this server."""

    def __init__(self, address: str, file: IndexedFile, range_header: str):
        part = _range(range_header, file.size)
        start, end = part or (0, file.size)
        kind, safe = _type_of(file.path)
        headers = {
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, no-cache",
            "Content-Length": str(end - start),
            "Content-Disposition": "inline" if safe else "attachment",
            "ETag": f'"{file.size:x}-{file.mtime:x}"',
            "Last-Modified": email.utils.formatdate(file.mtime / 1e9, usegmt=True),
        }
        if part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        content = _read_range(address, start, end)
        super().__init__(content, 206 if part else 200, headers, media_type=kind)


def _range(header: str, size: int) -> tuple[int, int] | None:
    """[start, end) of the header Range; None for the whole file, also in place of many parts.

    Raises:
        HTTPException: 416 for one outside of the file.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not found:
        return None
    first, last = found.groups()
    start = int(first) if first else max(size - int(last or 0), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        raise HTTPException(416, "the range lies outside of the file")
    return start, end


def _read_range(address: str, start: int, end: int) -> Iterator[bytes]:
    with remote.open_file(address) as file:
        file.seek(start)
        while start < end and (data := file.read(min(remote.BLOCK, end - start))):
            start += len(data)
            yield data


def _type_of(name: str) -> tuple[str, bool]:
    """(media type, whether a browser may show it: it must not run a file, whatever its name)."""
    suffix = os.path.splitext(name)[1].lower()
    kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0] or ""
    return (kind, True) if kind.startswith("video/") else ("application/octet-stream", False)


def not_modified(response: Response, scope: Scope) -> Response | None:
    """The 304 response of a request whose client has `response` already; None if it has not.

    Args:
        response: with the header ETag.
    """
    if StaticFiles().is_not_modified(response.headers, Headers(scope=scope)):
        return NotModifiedResponse(response.headers)
    return None
