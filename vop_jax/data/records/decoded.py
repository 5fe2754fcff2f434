"""Frames of a split, decoded; and what to cut out of them where the devices keep them.

Kept on the devices are the F frames of each clip, all of one size, padded at the bottom and the
right. What a batch needs of them is told in a few numbers a row.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from vop_jax.data.records.read import Split
from vop_jax.errors import UserError
from vop_jax.video.sampling import sample_indices
from vop_jax.video.workers import in_threads

T = TypeVar("T")

RANDOM = ("rand", "segments")  # samplings that draw


def frame_shapes(split: Split, frames: int, sampling: str, threads: int) -> list[tuple[int, int]]:
    """(h, w) of each clip; reads all records, decodes none.

    Raises:
        UserError: the frames of a clip are of several sizes.
    """

    def shape(index: int) -> tuple[int, int]:
        stored = split[index]
        found = {Image.open(io.BytesIO(stored[i])).size for i in _chosen(stored, frames, sampling)}
        if len(found) > 1:
            raise UserError(
                f"config.data.device_cache_gb: the frames of {split.ids[index]!r} are of several "
                "sizes; set it to 0 to read from the records"
            )
        width, height = found.pop()
        return height, width

    shapes = in_threads(shape, range(len(split)), threads)
    return list(_shown(shapes, "sizes of frames", len(split)))


def clips_of(
    split: Split, numbers: Sequence[int], frames: int, sampling: str, threads: int
) -> Iterator[np.ndarray]:
    """uint8 [F, h, w, 3] of each of these clips, in order."""

    def pixels(index: int) -> np.ndarray:
        return np.stack(decode(split[index], frames, sampling))

    clips = in_threads(pixels, numbers, threads)
    yield from _shown(clips, "frames to the devices", len(numbers))


def _shown(clips: Iterable[T], what: str, count: int) -> Iterable[T]:
    """With a progress bar where progress is told, which of several processes is in the first."""
    return tqdm(clips, what, count, unit="clip", disable=not logging.level_info())


def draws_frames(split: Split, frames: int, sampling: str) -> bool:
    """Whether each epoch takes other frames: where more than F are stored, and drawn."""
    stored = (row["stored"] for row in split.rows if "stored" in row)
    return sampling in RANDOM and any(count > frames for count in stored)


def decode(
    stored: list[bytes], frames: int, sampling: str, rng: np.random.Generator | None = None
) -> list[np.ndarray]:
    """F of the stored JPEGs: uint8 [h, w, 3] each."""
    chosen = _chosen(stored, frames, sampling, rng)
    pictures = {int(i): np.asarray(Image.open(io.BytesIO(stored[i]))) for i in set(chosen)}
    return [pictures[int(i)] for i in chosen]


def _chosen(
    stored: list[bytes], frames: int, sampling: str, rng: np.random.Generator | None = None
) -> np.ndarray:
    if len(stored) == frames:  # they were sampled when they were stored
        return np.arange(frames)
    return sample_indices(len(stored), frames, sampling, rng)
