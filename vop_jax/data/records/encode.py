"""A clip becomes what is stored of it: JPEG frames, and where in the video they are from.

Worker processes import this file: it stays light.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vop_jax.data.clips import VideoClip
from vop_jax.errors import VideoError
from vop_jax.video.frames import read_frames
from vop_jax.video.sampling import UNIFORM_RULE

RULE = "uniform_rule"  # the key of `described`


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How clips are stored; the comments are in `vop_jax.config.base`, section `data`."""

    frames: int = 12
    sampling: str = "uniform"
    stored_fps: float = 0.0
    short_side: int = 256
    jpeg_quality: int = 95
    short_clips: str = "skip"
    folder_fps: float = 0.0

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """From the config's section `data`."""
        made = cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})
        # Stored are all that may be drawn; CLIP4Clip's "linspace" also decides which these are.
        if made.sampling == "rand" or (made.stored_fps and made.sampling != "linspace"):
            made = dataclasses.replace(made, sampling="uniform")
        return made

    @property
    def needs_rule(self) -> bool:
        """Whether the rule of uniform sampling decides which frames are stored."""
        return self.sampling == "uniform" and not self.stored_fps

    def described(self) -> dict[str, Any]:
        """What records say of how they were made."""
        rule = {RULE: UNIFORM_RULE} if self.needs_rule else {}
        return dataclasses.asdict(self) | rule


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What is stored of a clip: JPEGs, and of `frames.Frames` what tells where they are from."""

    jpegs: list[bytes]
    indices: list[int]
    timestamps: list[float]
    count: int


def encode_clip(clip: VideoClip, preprocessing: Preprocessing) -> Encoded:
    """Decodes, samples and compresses a clip.

    Raises:
        VideoError: it cannot be used, and why.
    """
    frames = read_frames(
        clip.path,
        preprocessing.frames,
        start=clip.start,
        end=clip.end,
        fps=preprocessing.stored_fps,
        short_side=preprocessing.short_side,
        sampling=preprocessing.sampling,
        folder_fps=preprocessing.folder_fps,
    )
    distinct = len(set(frames.indices))
    if distinct < preprocessing.frames and preprocessing.short_clips == "skip":
        raise VideoError(
            f"{distinct} frames, fewer than config.data.frames={preprocessing.frames}; "
            "config.data.short_clips='repeat' would use it"
        )
    jpegs = {
        index: _jpeg(pixels, preprocessing.jpeg_quality)
        for index, pixels in zip(frames.indices, frames.pixels, strict=True)
    }
    return Encoded(
        [jpegs[index] for index in frames.indices], frames.indices, frames.timestamps, frames.count
    )


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Without chroma subsampling, which would blur small coloured things."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()
