"""Which files of a folder are videos."""

import dataclasses
import os
import posixpath
from collections.abc import Container

from absl import logging

from vop_jax.errors import UserError
from vop_jax.storage.files import walk
from vop_jax.video.files import VIDEOS

# Of ISO media, that are no videos: pictures and sound.
OTHER_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"crx ", b"M4A ", b"M4B ")
# Where a file of another name is a video: (offset, bytes).
SIGNATURES = (
    *((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide")),  # mp4, mov
    *((0, b"\x1aE\xdf\xa3"), (8, b"AVI "), (0, b"FLV\x01")),  # mkv and webm, avi, flv
    *((0, b"0&\xb2u\x8ef\xcf\x11"), (0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3")),  # wmv, mpg
)
# MPEG-TS: where its packets begin, on a camcorder's card with four bytes before each.
PACKETS = tuple(range(0, 5 * 188, 188)), tuple(range(4, 5 * 192, 192))
HEAD = 1024  # bytes of a file by which its kind is known
TEXT_TOO = (".ts", ".mts")  # also end the names of TypeScript's sources


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A file as it is now.

    Attributes:
        path: relative to the folder, with /.
        size: bytes; mtime: nanoseconds.
    """

    path: str
    size: int
    mtime: int


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a folder holds.

    Attributes:
        files: its videos, sorted by their paths.
        unlisted: {relative path: reason} of the folders in it that cannot be listed.
    """

    files: list[Found]
    unlisted: dict[str, str]

    def is_gone(self, path: str) -> bool:
        """Whether a file that is not among `files` is known not to be there."""
        return not any(path.startswith(f"{folder}/") for folder in self.unlisted)


def find_videos(folder: str, known: Container[str] = ()) -> Scan:
    """All videos in a folder and below, links followed, hidden files and folders left out.

    A video is what is named as one or begins as one.

    Args:
        known: paths that are videos without being opened.

    Raises:
        UserError: there is no such folder, or no video in it, or it cannot be listed.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of videos on this machine")
    files: list[Found] = []
    unlisted: dict[str, str] = {}

    def note(error: OSError) -> None:
        path = os.path.relpath(error.filename, folder).replace(os.sep, "/")
        if path == ".":
            raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
        unlisted[path] = error.strerror or str(error)

    for inside, folders, names in walk(folder, unlisted=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                files += _look_at(folder, posixpath.join(inside, name), known)
    if not files:
        also = "".join(f"; {path} cannot be listed ({why})" for path, why in unlisted.items())
        raise UserError(
            f"{folder}: no videos in this folder; their names end with {' '.join(VIDEOS)}{also}"
        )
    return Scan(sorted(files, key=lambda file: file.path), unlisted)


def _look_at(folder: str, path: str, known: Container[str]) -> list[Found]:
    """The file, if it is a video."""
    whole = os.path.join(folder, path)
    if not _is_text(path):
        logging.warning("%r: left out, its name is not UTF-8", whole)
        return []
    try:
        if path in known or _is_video(path, whole):
            state = os.stat(whole)
            return [Found(path, state.st_size, state.st_mtime_ns)]
    except OSError:  # it is not ours to read, or its drive went away
        if path in known or (path.lower().endswith(VIDEOS) and os.path.lexists(whole)):
            return [Found(path, 0, 0)]  # decoding will find the reason
    return []


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_video(path: str, whole: str) -> bool:
    named = path.lower().endswith(VIDEOS)
    if named and not path.lower().endswith(TEXT_TOO):
        return True
    if not os.path.isfile(whole):  # a pipe would be waited for
        return False
    with open(whole, "rb") as file:
        head = file.read(HEAD)
    if named:
        return b"\0" in head
    if head[4:8] == b"ftyp" and head[8:12] in OTHER_BRANDS:
        return False
    return any(head[at : at + len(mark)] == mark for at, mark in SIGNATURES) or any(
        len(head) == HEAD and all(head[at] == 0x47 for at in starts) for starts in PACKETS
    )
