"""CLIP's preprocessing up to, not including, normalisation: frames stay uint8.

Resizing is Pillow's bicubic, which antialiases when it shrinks and is what CLIP was trained
with. All frames of a clip get one and the same crop.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


def _resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    resized = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def resize_short_side(frame: np.ndarray, size: int, *, enlarge: bool = True) -> np.ndarray:
    """uint8 [h, w, 3] -> its shorter side `size`, aspect kept (torchvision's rounding)."""
    height, width = frame.shape[:2]
    short = min(height, width)
    if short <= size and not enlarge:
        return frame
    return _resize(frame, *(size if s == short else int(size * s / short) for s in (width, height)))


def eval_crop(frames: Sequence[np.ndarray] | np.ndarray, size: int) -> np.ndarray:
    """Resize the short side to `size`, cut out the centre: F x [h, w, 3] -> [F, size, size, 3]."""
    cropped = []
    for frame in frames:
        frame = resize_short_side(frame, size)
        top = round((frame.shape[0] - size) / 2)
        left = round((frame.shape[1] - size) / 2)
        cropped.append(frame[top : top + size, left : left + size])
    return np.stack(cropped)


def train_crop(
    frames: Sequence[np.ndarray] | np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> np.ndarray:
    """Random-resized crop and flip, the same for all frames: F x [h, w, 3] -> [F, size, size, 3].

    Args:
        scale: range of the crop's area, as a share of the frame's.
        ratio: range of the crop's width / height.
        flip: mirror every second clip left to right.
    """
    top, left, height, width = _draw_crop(frames[0].shape[:2], rng, scale, ratio)
    mirrored = flip and rng.random() < 0.5
    cropped = [_resize(f[top : top + height, left : left + width], size, size) for f in frames]
    stacked = np.stack(cropped)
    return np.ascontiguousarray(stacked[:, :, ::-1]) if mirrored else stacked


def _draw_crop(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) inside [h, w]; the ratio is uniform in its logarithm."""
    h, w = shape
    for _ in range(CROP_ATTEMPTS):
        area = h * w * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= w and 0 < height <= h:
            return (
                int(rng.integers(0, h - height + 1)),
                int(rng.integers(0, w - width + 1)),
                height,
                width,
            )
    # A very long frame: the largest centre crop of an allowed ratio.
    width, height = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))
    return (h - height) // 2, (w - width) // 2, height, width
