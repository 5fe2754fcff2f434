"""CLIP's preprocessing up to, not including, normalisation: frames stay uint8.

Resizing is Pillow's bicubic, which antialiases when it shrinks and is what CLIP was trained
with. All frames of a clip get one and the same crop. Where a crop lies is one thing and to cut
it out another: frames that are on the devices are cut out there, see `data/resampling.py`.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a picture [S, S] comes out of a frame: a box of it, resized, and a window of that.

    Attributes:
        top, left, height, width: the box, in pixels of the frame.
        rows, columns: what it is resized to.
        down, right: where the window begins.
        mirrored: left to right.
    """

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int
    down: int = 0
    right: int = 0
    mirrored: bool = False


def resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3]."""
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(frame)
    # In two calls: since version 13 Pillow resizes some pictures the other way round.
    for size in ((width, image.height), (width, height)):
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def _short_side(shape: Sequence[int], size: int) -> tuple[int, int]:
    """(height, width) with the shorter side `size`, aspect kept (torchvision's rounding)."""
    short = min(shape)
    height, width = (size if s == short else int(size * s / short) for s in shape)
    return height, width


def resize_short_side(frame: np.ndarray, size: int, *, enlarge: bool = True) -> np.ndarray:
    """uint8 [h, w, 3] -> its shorter side `size`, aspect kept (torchvision's rounding)."""
    if min(frame.shape[:2]) <= size and not enlarge:
        return frame
    height, width = _short_side(frame.shape[:2], size)
    return resize(frame, width, height)


def cut_out(frames: Sequence[np.ndarray] | np.ndarray, size: int, cut: Cut) -> np.ndarray:
    """F x [h, w, 3] -> [F, size, size, 3]."""
    pictures = []
    for frame in frames:
        box = frame[cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]
        resized = resize(box, cut.columns, cut.rows)
        pictures.append(resized[cut.down : cut.down + size, cut.right : cut.right + size])
    stacked = np.stack(pictures)
    return np.ascontiguousarray(stacked[:, :, ::-1]) if cut.mirrored else stacked


def centre_cut(shape: Sequence[int], size: int) -> Cut:
    """The short side of [h, w] resized to `size`, and the centre of that."""
    rows, columns = _short_side(shape, size)
    down, right = round((rows - size) / 2), round((columns - size) / 2)
    return Cut(0, 0, shape[0], shape[1], rows, columns, down, right)


def draw_cut(
    shape: Sequence[int],
    size: int,
    rng: np.random.Generator,
    *,
    scale: Range = (0.5, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Cut:
    """Random-resized crop and flip of [h, w].

    Args:
        scale: range of the crop's area, as a share of the frame's.
        ratio: range of the crop's width / height.
        flip: mirror every second clip left to right.
    """
    box = _draw_box(shape, rng, scale, ratio)
    return Cut(*box, size, size, mirrored=bool(flip and rng.random() < 0.5))


def eval_crop(frames: Sequence[np.ndarray] | np.ndarray, size: int) -> np.ndarray:
    """Resize the short side to `size`, cut out the centre: F x [h, w, 3] -> [F, size, size, 3]."""
    cropped = np.empty((len(frames), size, size, 3), np.uint8)
    for row, frame in zip(cropped, frames, strict=True):
        row[:] = cut_out([frame], size, centre_cut(frame.shape[:2], size))[0]
    return cropped


def train_crop(
    frames: Sequence[np.ndarray] | np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: Range = (0.5, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    flip: bool = True,
) -> np.ndarray:
    """`draw_cut`, the same for all frames: F x [h, w, 3] -> [F, size, size, 3]."""
    shape = frames[0].shape[:2]
    return cut_out(frames, size, draw_cut(shape, size, rng, scale=scale, ratio=ratio, flip=flip))


def _draw_box(
    shape: Sequence[int], rng: np.random.Generator, scale: Range, ratio: Range
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
