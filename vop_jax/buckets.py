"""Captions in the shortest of a few widths that holds them.

What stands behind a caption's EOT is never seen by it under the causal mask, so that fewer
slots give the same features, up to the rounding of other shapes. Each width is a program.
"""

from collections.abc import Sequence

import numpy as np

RARE = 1e-3  # of all batches


def longest(ids: np.ndarray) -> int:
    """Slots that the longest of the captions [N, T] takes, its EOT, the largest id, included."""
    return int(ids.argmax(axis=-1).max(initial=-1)) + 1


def cut(ids: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """int32 [N, T] -> [N, T'], the smallest bucket that holds all of them, or T itself."""
    needed = longest(ids)
    return ids[:, : min((width for width in buckets if width >= needed), default=ids.shape[1])]


def widths(ids: np.ndarray, buckets: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """Ascending: what `cut` makes of batches drawn from the captions [N, T], but for the RARE.

    A batch fits a width if all its captions do: of n of N that fit, none drawn twice, by chance
    n / N * (n - 1) / (N - 1) * …
    """
    count, slots = ids.shape
    allowed = sorted({slots, *(min(width, slots) for width in buckets)})
    lengths, drawn = ids.argmax(axis=-1) + 1, np.arange(min(batch_size, count))
    fitting = [np.sum(lengths <= width) for width in allowed]
    chances = [np.prod(np.maximum(n - drawn, 0) / (count - drawn)) for n in fitting]
    shares = np.diff(chances, prepend=0.0)
    return tuple(width for width, share in zip(allowed, shares, strict=True) if share >= RARE)
