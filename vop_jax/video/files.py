"""How many bytes a video file says it has: one that has fewer was not copied to its end."""

import contextlib
import struct
from typing import BinaryIO


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
