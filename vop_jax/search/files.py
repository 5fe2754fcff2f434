"""Which files of a folder are videos."""

import dataclasses
import os
from collections.abc import Iterator

from absl import logging

from vop_jax.data.locate import VIDEOS
from vop_jax.errors import UserError

# Of ISO media, that are no videos: pictures and sound.
OTHER_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"crx ", b"M4A ", b"M4B ")
# Where a file of another name is a video: (offset, bytes).
SIGNATURES = (
    *((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide")),  # mp4, mov
    *((0, b"\x1aE\xdf\xa3"), (8, b"AVI "), (0, b"FLV\x01")),  # mkv and webm, avi, flv
    *((0, b"0&\xb2u\x8ef\xcf\x11"), (0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3")),  # wmv, mpg
)


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


def find_videos(folder: str, known: frozenset[str] | set[str] = frozenset()) -> list[Found]:
    """All videos in a folder and below, links followed, hidden files and folders left out.

    A video is what is named as one or begins as one.

    Args:
        known: paths that are not opened to be told.

    Raises:
        UserError: there is no such folder, or no video in it, or one that cannot be listed.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of videos on this machine")
    found = []
    for path in _files(folder):
        whole = os.path.join(folder, path)
        if not _is_text(path):
            logging.warning("%r: left out, its name is not UTF-8", whole)
            continue
        try:
            if path.lower().endswith(VIDEOS) or path in known or _begins_as_video(whole):
                state = os.stat(whole)
                found.append(Found(path, state.st_size, state.st_mtime_ns))
        except OSError:  # it went away, or is not ours to read
            if path.lower().endswith(VIDEOS) and os.path.lexists(whole):
                found.append(Found(path, 0, 0))  # decoding will tell the reason
    if not found:
        raise UserError(
            f"{folder}: no videos in this folder; their names end with {' '.join(VIDEOS)}"
        )
    return sorted(found, key=lambda file: file.path)


def _files(folder: str) -> Iterator[str]:
    """Relative paths of all files."""

    def unlisted(error: OSError) -> None:
        # Were it passed over, an index would take all that is in there for deleted.
        if not isinstance(error, FileNotFoundError):
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None

    seen = set()  # links may lead in circles
    for root, folders, names in os.walk(folder, onerror=unlisted, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(root, folder)
        for name in names:
            if not name.startswith("."):
                yield os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/")


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _begins_as_video(path: str) -> bool:
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in OTHER_BRANDS:
        return False
    return any(head[at : at + len(mark)] == mark for at, mark in SIGNATURES)
