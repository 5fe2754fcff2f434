"""Folders of extracted frames: pictures numbered in their order."""

import os
import re
from typing import BinaryIO

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from vop_jax.errors import VideoError
from vop_jax.video.crops import resize_short_side

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def list_pictures(folder: str | os.PathLike) -> list[epath.Path]:
    """The pictures of a folder by their numbers: 2.jpg comes before 10.jpg.

    Raises:
        VideoError: there are none.
    """
    found = [path for path in epath.Path(folder).iterdir() if is_picture(path.name)]
    if not found:
        raise VideoError(f"a folder without pictures ({', '.join(PICTURES)})")
    return sorted(found, key=lambda path: _natural(path.name))


def is_picture(name: str) -> bool:
    """Whether a file of that name is one; hidden ones are not, such as macOS's `._0001.jpg`."""
    return name.lower().endswith(PICTURES) and not name.startswith(".")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Digits compare as numbers, before letters."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]


def decode_picture(file: BinaryIO, most: int = 0) -> np.ndarray:
    """uint8 RGB [h, w, 3], upright.

    Args:
        most: pixels that it may have; 0: what Pillow takes.

    Raises:
        VideoError: it is no picture, damaged, or too large.
    """
    try:
        with Image.open(file) as picture:
            if most and picture.width * picture.height > most:
                raise VideoError(f"a picture of more than {most // 10**6} million pixels")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise VideoError("not readable as a picture") from None


def read_picture(path: epath.Path, short_side: int | None) -> np.ndarray:
    """uint8 RGB [h, w, 3], larger ones shrunk to `short_side`.

    Raises:
        VideoError: it is no picture, or damaged.
    """
    try:
        with path.open("rb") as file:
            pixels = decode_picture(file)
    except (OSError, VideoError):
        raise VideoError(f"{path.name}: not readable as a picture") from None
    return resize_short_side(pixels, short_side, enlarge=False) if short_side else pixels
