"""The video files of a folder."""

import dataclasses
import os
import posixpath
from collections.abc import Container

from absl import logging

from vop_jax.errors import UserError
from vop_jax.storage.files import walk
from vop_jax.video.files import VIDEOS

# Brands of ISO media that are pictures or sound.
OTHER_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"crx ", b"M4A ", b"M4B ")
# (offset, bytes) that mark a video of any name.
SIGNATURES = (
    *((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide")),  # mp4, mov
    *((0, b"\x1aE\xdf\xa3"), (8, b"AVI "), (0, b"FLV\x01")),  # mkv and webm, avi, flv
    *((0, b"0&\xb2u\x8ef\xcf\x11"), (0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3")),  # wmv, mpg
)
# Offsets of the packets of MPEG-TS; the cards of camcorders put four bytes before each.
PACKETS = tuple(range(0, 5 * 188, 188)), tuple(range(4, 5 * 192, 192))
HEAD = 1024  # bytes of a file that tell its kind
TYPESCRIPT = (".ts", ".mts")  # endings of videos and of TypeScript's sources


@dataclasses.dataclass(frozen=True, slots=True)
class VideoFile:
    """A file on the disk.

    Attributes:
        path: relative to the folder, with /.
        size: bytes.
        mtime: nanoseconds.
    """

    path: str
    size: int
    mtime: int


@dataclasses.dataclass(frozen=True)
class Scan:
    """The content of a folder.

    Attributes:
        files: its videos, sorted by path.
        unlisted: {relative path: reason} of the folders in it that cannot be listed.
    """

    files: list[VideoFile]
    unlisted: dict[str, str]

    def is_gone(self, path: str) -> bool:
        """Whether a file that is not among `files` is known to be missing."""
        return not any(path.startswith(f"{folder}/") for folder in self.unlisted)


def find_videos(folder: str, indexed: Container[str] = ()) -> Scan:
    """All videos in a folder and below; links are followed, hidden files and folders left out.

    A file is a video by its name or by its first bytes.

    Args:
        indexed: paths that are videos without being opened.

    Raises:
        UserError: there is no such folder, or no video in it, or it cannot be listed.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of videos on this machine")
    files: list[VideoFile | None] = []
    unlisted: dict[str, str] = {}

    def note_unlisted(error: OSError) -> None:
        path = os.path.relpath(error.filename, folder).replace(os.sep, "/")
        if path == ".":
            raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
        unlisted[path] = error.strerror or str(error)

    for inside, folders, names in walk(folder, unlisted=note_unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (name for name in names if not name.startswith("."))
        files += [_inspect(folder, posixpath.join(inside, name), indexed) for name in visible]
    videos = sorted(filter(None, files), key=lambda file: file.path)
    if not videos:
        also = "".join(f"; {path} cannot be listed ({why})" for path, why in unlisted.items())
        raise UserError(
            f"{folder}: no videos in this folder; their names end with {' '.join(VIDEOS)}{also}"
        )
    return Scan(videos, unlisted)


def _inspect(folder: str, path: str, indexed: Container[str]) -> VideoFile | None:
    """The file; None for one that is no video."""
    whole = os.path.join(folder, path)
    try:
        path.encode()
    except UnicodeEncodeError:
        logging.warning("%r: left out, its name is not UTF-8", whole)
        return None
    try:
        if path in indexed or _is_video(whole):
            state = os.stat(whole)
            return VideoFile(path, state.st_size, state.st_mtime_ns)
    except OSError:  # no right to read it, or its drive disappeared
        if path in indexed or (path.lower().endswith(VIDEOS) and os.path.lexists(whole)):
            return VideoFile(path, 0, 0)  # decoding finds the reason
    return None


def _is_video(path: str) -> bool:
    named = path.lower().endswith(VIDEOS)
    if named and not path.lower().endswith(TYPESCRIPT):
        return True
    if not os.path.isfile(path):  # opening a pipe would wait
        return False
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if named:
        return b"\0" in head
    if head[4:8] == b"ftyp" and head[8:12] in OTHER_BRANDS:
        return False
    return any(head[at : at + len(mark)] == mark for at, mark in SIGNATURES) or any(
        len(head) == HEAD and all(head[at] == 0x47 for at in offsets) for offsets in PACKETS
    )
