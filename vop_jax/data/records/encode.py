"""How a clip becomes JPEG frames, with where in the video they are from.

Worker processes import this file: it stays light.
"""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from vop_jax.config.keys import DataSection
from vop_jax.data.clips import VideoClip
from vop_jax.errors import VideoError
from vop_jax.video.frames import read_frames
from vop_jax.video.sampling import OLDER_RULE, UNIFORM_RULE

RULE = "uniform_rule"  # key of the metadata


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How clips are stored: keys of the config's section `data`, documented there."""

    frames: int = DataSection.frames
    sampling: str = DataSection.sampling
    stored_fps: float = DataSection.stored_fps
    short_side: int = DataSection.short_side
    jpeg_quality: int = DataSection.jpeg_quality
    short_clips: str = DataSection.short_clips
    folder_fps: float = DataSection.folder_fps

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """From the config's section `data`."""
        values = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        # All frames that may be drawn are stored; CLIP4Clip's "linspace" also decides which.
        if values["sampling"] == "rand" or (
            values["stored_fps"] and values["sampling"] != "linspace"
        ):
            values["sampling"] = "uniform"
        return cls(**values)

    def to_metadata(self) -> dict[str, Any]:
        """What records keep of it, with the rule of uniform sampling where it chose frames."""
        return dataclasses.asdict(self) | ({RULE: UNIFORM_RULE} if self._uses_rule else {})

    @property
    def _uses_rule(self) -> bool:
        return self.sampling == "uniform" and not self.stored_fps

    def differences(self, metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """(key, value of the records, own value) of each key that makes records unusable."""
        for key, value in dataclasses.asdict(self).items():
            by_time = key == "sampling" and self._stored_by_time(metadata)
            if metadata.get(key) != value and not by_time:
                yield key, metadata.get(key), value

    def older_rule(self, metadata: Mapping[str, Any]) -> str:
        """A warning about records whose frames an older rule chose; else ""."""
        if self._stored_by_time(metadata):
            return (
                "the frames were stored by their times; CLIP4Clip, which data.sampling='linspace' "
                "is for, counts them by a whole rate; delete that folder to make the records again"
            )
        if not self._uses_rule or metadata.get(RULE, OLDER_RULE) == UNIFORM_RULE:
            return ""
        return (
            f"the frames were sampled by the older rule {OLDER_RULE}: about half of them are one "
            f"frame later than by the published {UNIFORM_RULE}; delete that folder to make the "
            "records again"
        )

    def _stored_by_time(self, metadata: Mapping[str, Any]) -> bool:
        """Whether CLIP4Clip's sampling meets records at a rate from before it had its own rule."""
        both = metadata.get("sampling"), self.sampling
        return bool(self.stored_fps) and both == ("uniform", "linspace")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """JPEGs of a clip, with index and time (seconds) of each in the video of `count` frames."""

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
