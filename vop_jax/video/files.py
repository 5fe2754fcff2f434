"""What a video file is: its name, whether it is there, and how many bytes it says it has."""

import contextlib
import functools
import os
import posixpath
import struct
import unicodedata
from typing import BinaryIO

from etils import epath
from etils.epath.stat_utils import StatResult

from vop_jax.errors import VideoError

# What names of videos end with, in lower case; also those that a search indexes.
VIDEOS = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".asf", ".flv"),
    *(".f4v", ".3gp", ".3g2", ".ts", ".mts", ".m2ts", ".vob", ".mxf", ".ogv", ".gif", ".divx"),
    *(".qt", ".dv", ".m2v", ".rm", ".rmvb"),
)


def stated_bytes(file: BinaryIO, container: str) -> int:
    """The end of the outermost elements, which hold all others; 0 where the file does not say.

    Args:
        container: FFmpeg's name of the format.
    """
    for names, end in (("mov", _mp4_end), ("avi", _riff_end), ("matroska", _matroska_end)):
        if container.startswith(names):
            with contextlib.suppress(ValueError, LookupError, OverflowError):  # of no possible size
                return end(file)
    return 0


def _mp4_end(file: BinaryIO) -> int:
    """Boxes: 4 bytes of size, 4 of type, and 8 of size where that was 1."""
    end = 0
    while len(head := _at(file, end, 16)) >= 8:
        size, kind = struct.unpack(">I4s", head[:8])
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack(">Q", head[8:])
        if size < 8 or not kind.isalnum():  # the last box reaches the end, or there is none
            break
        end += size
    return end


def _riff_end(file: BinaryIO) -> int:
    """One chunk, of files beyond 1 GB several."""
    end = 0
    while len(head := _at(file, end, 8)) == 8 and head[:4] == b"RIFF":
        end += 8 + int.from_bytes(head[4:], "little")
    return end


def _matroska_end(file: BinaryIO) -> int:
    """A header and then one segment, whose size a live recording does not know."""
    end = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        head = _at(file, end, 12)
        if head[:4] != name:
            return 0
        # The zeros that a size begins with tell how many more bytes it has.
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
    """The name of a video without its extensions, of which downloads add some: `ID.mp4.webm`.

    Accents are composed (NFC); macOS decomposes them in the names of files.
    """
    name = unicodedata.normalize("NFC", posixpath.basename(path))
    while name.lower().endswith(VIDEOS):
        name = name.rpartition(".")[0]
    return name


def stat(path: str | os.PathLike) -> StatResult:
    """Kind, size and time of a file or folder that a user or an annotation file names.

    Raises:
        VideoError: it is not there or cannot be a file, and why.
    """
    text = os.fspath(path)
    try:
        if not text:
            raise FileNotFoundError
        return epath.Path(text).stat()
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(text):
            raise VideoError("a link to what is not there") from None
        raise VideoError("no such file" + _hint(text)) from None
    except (KeyError, NotImplementedError):  # etils looks the scheme up
        scheme = text.partition("://")[0].rpartition("/")[2]
        raise VideoError(f"an address ({scheme}://), not a file; download it") from None
    except ImportError as error:  # what a bucket needs
        raise VideoError(str(error)) from None
    except ValueError:
        raise VideoError("not the name of a file") from None
    except OSError as error:
        raise VideoError(f"cannot be opened ({error.strerror or error})") from None
    except Exception as error:  # the clients of buckets raise what they like
        if "://" not in text:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise VideoError(f"cannot be opened ({reason})") from None


def _hint(path: str) -> str:
    """The file of nearly that name, if there is one; names are often given without extension."""
    folder, name = os.path.split(path)
    if "://" in path or name_of(name) not in (there := _names_in(folder or ".")):
        return ""
    other = there[name_of(name)]
    same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
    return f", but there is {ascii(other) if same or not other.isprintable() else other}"


@functools.lru_cache(4)  # many files of a folder may be missing
def _names_in(folder: str) -> dict[str, str]:
    try:
        return {name_of(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}
