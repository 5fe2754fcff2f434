"""Pictures: one from any file, and folders of extracted frames."""

import math
import os
import re
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from vop_jax.errors import VideoError
from vop_jax.video.crops import resize_short_side

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's; hidden files are none, such as macOS's `._0001.jpg`."""
    return name.lower().endswith(PICTURES) and not name.startswith(".")


def decode_picture(file: BinaryIO, max_pixels: int = 0) -> np.ndarray:
    """uint8 RGB [h, w, 3], upright.

    Args:
        max_pixels: limit of the picture's size; 0: Pillow's own.

    Raises:
        VideoError: the file is no picture, damaged, or too large.
    """
    try:
        with Image.open(file) as picture:
            if max_pixels and picture.width * picture.height > max_pixels:
                raise VideoError(f"a picture of more than {max_pixels // 10**6} million pixels")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise VideoError("not readable as a picture") from None


class FolderReader:
    """Reads a folder of extracted frames as `SegmentReader` reads a segment of a file.

    Pictures are in the order of their numbers: 2.jpg comes before 10.jpg.

    Args:
        fps: pictures a second; 0: unknown, then all pictures count and times are NaN.
        start, end: seconds; only pictures shown in [start, end) count.

    Attributes:
        times: seconds of each picture that counts.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        fps: float,
        start: float,
        end: float,
        short_side: int | None,
    ):
        files = [path for path in epath.Path(folder).iterdir() if is_picture(path.name)]
        if not files:
            raise VideoError(f"a folder without pictures ({', '.join(PICTURES)})")
        files.sort(key=lambda path: _sort_key(path.name))
        times = [i / fps if fps else math.nan for i in range(len(files))]
        pairs = [
            pair for pair in zip(files, times, strict=True) if not fps or start <= pair[1] < end
        ]
        self._files, self.times = [file for file, _ in pairs], [time for _, time in pairs]
        self._short_side = short_side

    def packet_times(self) -> list[float]:
        """The same as `times`."""
        return self.times

    def decode(self, indices: Iterable[int]) -> dict[int, np.ndarray]:
        """uint8 [h, w, 3] of these pictures, by index."""
        return {index: self._read(self._files[index]) for index in dict.fromkeys(indices)}

    def _read(self, path: epath.Path) -> np.ndarray:
        try:
            with path.open("rb") as file:
                pixels = decode_picture(file)
        except (OSError, VideoError):
            raise VideoError(f"{path.name}: not readable as a picture") from None
        if not self._short_side:
            return pixels
        return resize_short_side(pixels, self._short_side, enlarge=False)


def _sort_key(name: str) -> list[tuple[int, int, str]]:
    """Digits compare as numbers, before letters."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]
