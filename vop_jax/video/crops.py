"""CLIP's preprocessing up to, not including, normalisation: frames stay uint8.

Resizing is Pillow's bicubic, which antialiases when it shrinks; CLIP was trained with it. All
frames of a clip get the same crop. `Crop` says where a crop lies and `apply_crop` takes it out;
`training/device_cache.py` takes it out of frames that are on the devices.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Crop:
    """How a picture [S, S] comes out of a frame: a box is resized, a window of that is taken.

    Attributes:
        top, left, height, width: the box, in pixels of the frame.
        rows, columns: the size that the box is resized to.
        window_top, window_left: the corner of the window, in pixels of the resized box.
        mirrored: whether the picture is mirrored left to right.
    """

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int
    window_top: int = 0
    window_left: int = 0
    mirrored: bool = False

    def numbers(self) -> np.ndarray:
        """int32 [9]: the attributes in their order, as `device_cache.crop_frames` takes them."""
        return np.array(dataclasses.astuple(self), np.int32)


def resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3]."""
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(frame)
    # In two calls: Pillow 13 resizes some pictures vertically first.
    for size in ((width, image.height), (width, height)):
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def resize_short_side(frame: np.ndarray, size: int, *, enlarge: bool = True) -> np.ndarray:
    """uint8 [h, w, 3] -> its shorter side `size`, aspect ratio preserved."""
    if min(frame.shape[:2]) <= size and not enlarge:
        return frame
    height, width = _scale_short_side(frame.shape[:2], size)
    return resize(frame, width, height)


def centre_crop(shape: Sequence[int], size: int) -> Crop:
    """The crop for evaluation: the short side of [h, w] resized to `size`, the centre of that."""
    rows, columns = _scale_short_side(shape, size)
    window_top, window_left = round((rows - size) / 2), round((columns - size) / 2)
    return Crop(0, 0, shape[0], shape[1], rows, columns, window_top, window_left)


def draw_crop(
    shape: Sequence[int],
    size: int,
    rng: np.random.Generator,
    *,
    scale: Range = (0.5, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Crop:
    """The crop for training: random-resized and, for half of the clips, mirrored.

    Args:
        shape: (h, w) of the frames.
        scale: range of the crop's area, as a share of the frame's.
        ratio: range of the crop's width / height.
        flip: whether to mirror.
    """
    box = _draw_box(shape, rng, scale, ratio)
    return Crop(*box, size, size, mirrored=bool(flip and rng.random() < 0.5))


def apply_crop(frames: Sequence[np.ndarray] | np.ndarray, size: int, crop: Crop) -> np.ndarray:
    """F x [h, w, 3] -> [F, size, size, 3]."""
    pictures = []
    for frame in frames:
        box = frame[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        resized = resize(box, crop.columns, crop.rows)
        pictures.append(resized[crop.window_top :, crop.window_left :][:size, :size])
    stacked = np.stack(pictures)
    return np.ascontiguousarray(stacked[:, :, ::-1]) if crop.mirrored else stacked


def eval_crop(frames: Sequence[np.ndarray] | np.ndarray, size: int) -> np.ndarray:
    """`centre_crop` of each frame, which may differ in size: F x [h, w, 3] -> [F, S, S, 3]."""
    cropped = np.empty((len(frames), size, size, 3), np.uint8)
    for row, frame in zip(cropped, frames, strict=True):
        row[:] = apply_crop([frame], size, centre_crop(frame.shape[:2], size))[0]
    return cropped


def _scale_short_side(shape: Sequence[int], size: int) -> tuple[int, int]:
    """(height, width) with the shorter side `size`, rounded as torchvision does."""
    short = min(shape)
    height, width = (size if side == short else int(size * side / short) for side in shape)
    return height, width


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
            top, left = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1)
            return int(top), int(left), height, width
    # No box fits a very long frame: take the largest centre crop of an allowed ratio.
    width, height = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))
    return (h - height) // 2, (w - width) // 2, height, width
