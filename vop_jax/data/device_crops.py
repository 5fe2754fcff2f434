"""Pillow's bicubic resizing as numbers: a device that adds up the same gives the same pixels.

A side is resized by a sum over a few neighbours with whole-number weights, the same for all
rows of a frame: horizontally first, rounded to uint8, then vertically.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from vop_jax.video.crops import Cut, centre_cut

BITS = 22  # of a weight's fraction
SUPPORT = 2.0  # of the filter, in pixels of the coarser side
Side = tuple[int, int, int]  # (length, resized to, where the window begins)


class Sides:
    """Every way in which a side of a frame may become one of S pixels, numbered.

    Attributes:
        first: int32 [n, S], the first pixel that an output pixel is a sum over, from the box's.
        weights: int32 [n, S, K], those of K pixels from there on; one is `1 << BITS`.
    """

    def __init__(self, sides: Iterable[Side], size: int):
        found = sorted(set(sides))
        self._numbers = {side: number for number, side in enumerate(found)}
        taps = [weights_of(length, resized) for length, resized, _ in found]
        most = max(weights.shape[1] for _, weights in taps)
        self.first = np.zeros((len(found), size), np.int32)
        self.weights = np.zeros((len(found), size, most), np.int32)
        for number, ((_, _, begin), (first, weights)) in enumerate(zip(found, taps, strict=True)):
            window = slice(begin, begin + size)
            self.first[number] = first[window]
            self.weights[number, :, : weights.shape[1]] = weights[window]

    def numbers(self, cut: Cut) -> tuple[int, int]:
        """Of the vertical and the horizontal side of a cut."""
        vertical, horizontal = sides_of(cut)
        return self._numbers[vertical], self._numbers[horizontal]


def sides_of(cut: Cut) -> tuple[Side, Side]:
    """Vertical, horizontal."""
    return (cut.height, cut.rows, cut.down), (cut.width, cut.columns, cut.right)


@functools.cache
def weights_of(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`length` pixels -> `size`: first int32 [size], weights int32 [size, K], as in `Sides`."""
    scale = length / size
    coarse = max(scale, 1.0)  # shrinking, the filter is as wide as the coarser pixels
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - SUPPORT * coarse + 0.5).astype(int), 0)
    behind = np.minimum((centre + SUPPORT * coarse + 0.5).astype(int), length)
    at = first[:, None] + np.arange(2 * math.ceil(SUPPORT * coarse) + 1)  # [size, K]
    weights = _bicubic((at - centre[:, None] + 0.5) / coarse)
    weights = np.where(at < behind[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    rounded = np.trunc(weights * (1 << BITS) + np.where(weights < 0, -0.5, 0.5))
    return first.astype(np.int32), rounded.astype(np.int32)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' filter with a = -1/2."""
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How crops of clips [M, F, H, W, 3] are told.

    Attributes:
        shapes: (h, w) of each clip's frames, without the padding.
        sides: all ways in which crops are resized.
    """

    shapes: Sequence[tuple[int, int]]
    sides: Sides

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], size: int, augment: bool) -> "Drawn":
        """For pictures of `size` pixels; without augmentation the centre crops alone."""
        if augment:  # any box there may be
            longest = max(max(shape) for shape in shapes)
            return cls(shapes, Sides(((n, size, 0) for n in range(1, longest + 1)), size))
        found = (sides_of(centre_cut(shape, size)) for shape in set(shapes))
        return cls(shapes, Sides((side for pair in found for side in pair), size))

    def numbers(self, clip: int, cut: Cut) -> dict[str, np.ndarray]:
        """Of a row: its clip; the box's corner, top and left; the numbers of its sides."""
        return {
            "clip": np.array(clip, np.int32),
            "corner": np.array([cut.top, cut.left], np.int32),
            "sides": np.array(self.sides.numbers(cut), np.int32),
            "mirrored": np.array(cut.mirrored),
        }
