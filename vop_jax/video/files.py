"""Video files: their names, whether they exist, and the size that their headers state."""

import contextlib
import functools
import os
import posixpath
import struct
import unicodedata
from typing import BinaryIO

from etils import epath
from etils.epath.stat_utils import StatResult

from vop_jax.errors import UserError, VideoError
from vop_jax.storage import remote
from vop_jax.storage.files import is_remote

# Extensions of video files, in lower case; a search indexes files that have one.
VIDEOS = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".asf", ".flv"),
    *(".f4v", ".3gp", ".3g2", ".ts", ".mts", ".m2ts", ".vob", ".mxf", ".ogv", ".gif", ".divx"),
    *(".qt", ".dv", ".m2v", ".rm", ".rmvb"),
)


def stated_bytes(file: BinaryIO, container: str) -> int:
    """The end of the outermost elements of a file, which hold all others; 0 if it does not say.

    Args:
        container: FFmpeg's name of the format.
    """
    for names, end in (("mov", _mp4_end), ("avi", _riff_end), ("matroska", _matroska_end)):
        if container.startswith(names):
            # Damaged sizes state nothing.
            with contextlib.suppress(ValueError, LookupError, OverflowError):
                return end(file)
    return 0


def _mp4_end(file: BinaryIO) -> int:
    """Boxes: 4 bytes of size, 4 of type; if the size is 1, 8 more bytes hold it."""
    end = 0
    while len(head := _at(file, end, 16)) >= 8:
        size, kind = struct.unpack(">I4s", head[:8])
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack(">Q", head[8:])
        if size < 8 or not kind.isalnum():  # a last box without a size, or no box
            break
        end += size
    return end


def _riff_end(file: BinaryIO) -> int:
    """One chunk; files of more than 1 GB have several."""
    end = 0
    while len(head := _at(file, end, 8)) == 8 and head[:4] == b"RIFF":
        end += 8 + int.from_bytes(head[4:], "little")
    return end


def _matroska_end(file: BinaryIO) -> int:
    """A header and one segment, whose size is unknown in live recordings."""
    end = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        head = _at(file, end, 12)
        if head[:4] != name:
            return 0
        # The number of leading zero bits of a size is the number of its further bytes.
        more = 8 - head[4].bit_length()
        size = int.from_bytes(head[4 : 5 + more], "big") - (1 << 7 * (more + 1))
        if size == (1 << 7 * (more + 1)) - 1:
            return 0
        end += 5 + more + size
    return end


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def name_of(path: str) -> str:
    """The name of a video without its extensions; downloads may have two: `ID.mp4.webm`.

    Accents are composed (NFC), because macOS decomposes them in file names.
    """
    name = unicodedata.normalize("NFC", posixpath.basename(path))
    while name.lower().endswith(VIDEOS):
        name = name.rpartition(".")[0]
    return name


def stat(path: str | os.PathLike) -> StatResult:
    """Kind, size and time of a file or folder that a user or an annotation names.

    Raises:
        VideoError: it does not exist or cannot be a file, and why.
    """
    text = os.fspath(path)
    if is_remote(text):
        return _stat_remote(text)
    try:
        if not text:
            raise FileNotFoundError
        return epath.Path(text).stat()
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(text):
            raise VideoError("a link to what is not there") from None
        raise VideoError("no such file" + _hint(text)) from None
    except ValueError:
        raise VideoError("not the name of a file") from None
    except OSError as error:
        raise VideoError(f"cannot be opened ({error.strerror or error})") from None


def _stat_remote(address: str) -> StatResult:
    try:
        known = remote.describe(address)
    except FileNotFoundError:
        raise VideoError("no such file") from None
    except UserError as error:  # names the package that it needs
        raise VideoError(str(error)) from None
    except OSError as error:
        raise VideoError(f"cannot be opened ({error})") from None
    return StatResult(is_directory=known.is_folder, length=known.size, mtime=known.mtime // 10**9)


def _hint(path: str) -> str:
    """A note about a file of nearly that name: extensions are often missing or wrong."""
    folder, name = os.path.split(path)
    if "://" in path or name_of(name) not in (files := _files_by_name(folder or ".")):
        return ""
    other = files[name_of(name)]
    same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
    return f", but there is {ascii(other) if same or not other.isprintable() else other}"


@functools.lru_cache(4)  # many files of a folder may be missing
def _files_by_name(folder: str) -> dict[str, str]:
    try:
        return {name_of(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}
