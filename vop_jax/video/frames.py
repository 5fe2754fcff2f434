"""Sampled frames of a clip, from a video file or from a folder of its extracted frames."""

import dataclasses
import math
import os

import numpy as np

from vop_jax.errors import VideoError
from vop_jax.video.decode import SegmentReader
from vop_jax.video.files import stat
from vop_jax.video.images import FolderReader
from vop_jax.video.sampling import sample_indices, stored_indices
from vop_jax.video.stream import as_video_error


@dataclasses.dataclass(frozen=True)
class Frames:
    """Sampled frames of a clip.

    Attributes:
        pixels: uint8 RGB [h, w, 3] each, upright.
        indices: which decoded frame of the clip each is, from 0.
        timestamps: seconds in the file; NaN if unknown.
        count: how many frames the clip has.
    """

    pixels: list[np.ndarray]
    indices: list[int]
    timestamps: list[float]
    count: int


def read_frames(
    path: str | os.PathLike,
    frames: int,
    *,
    start: float | None = None,
    end: float | None = None,
    fps: float = 0.0,
    short_side: int | None = None,
    sampling: str = "uniform",
    folder_fps: float = 0.0,
) -> Frames:
    """Decodes a clip and samples it: the same frames from a file and from its extracted frames.

    Args:
        path: a video file, or a folder of pictures numbered in their order.
        frames: F, the number of frames, unless `fps` is set.
        start, end: seconds; only frames shown in [start, end) count.
        fps: take this many frames a second instead, however many those are.
        short_side: shrink larger frames to this, in pixels.
        sampling: see `sampling.sample_indices` and `sampling.stored_indices`.
        folder_fps: pictures a second in a folder; 0: unknown.

    Raises:
        VideoError: the file cannot be opened, has no video, is damaged or truncated, or shows
            nothing between `start` and `end`.
    """
    first, last = start or 0.0, math.inf if end is None else end

    def choose(times: list[float]) -> list[int]:
        if fps:
            return stored_indices(times, first, fps, sampling)
        return sample_indices(len(times), frames, sampling).tolist() if times else []

    reader: SegmentReader | FolderReader
    is_folder = stat(path).is_directory
    if is_folder:
        if not folder_fps and (fps or start is not None or end is not None):
            raise VideoError("a folder of frames; seconds need config.data.folder_fps")
        with as_video_error():
            reader = FolderReader(path, folder_fps, first, last, short_side)
    else:
        reader = SegmentReader(path, first, last, short_side)
    # Sequential decoding beats seeking, but which frames to keep depends on when they are shown.
    # Packets say that cheaply and nearly always rightly; if not, decode again.
    indices = choose(reader.packet_times())
    pixels = reader.decode(indices)
    if (decoded := choose(reader.times)) != indices:
        indices, pixels = decoded, reader.decode(decoded)
    if not indices:
        between = ""
        if start is not None or end is not None:
            between = f" between {first:g} and {'the end' if end is None else f'{end:g} s'}"
        raise VideoError(f"no frame{'' if is_folder else ' decodes'}{between}")
    times = [reader.times[i] for i in indices]
    return Frames([pixels[i] for i in indices], indices, times, len(reader.times))


def read_frame_at(path: str | os.PathLike, seconds: float) -> np.ndarray:
    """The frame on display at a time, or a file's last frame: uint8 RGB [h, w, 3].

    Raises:
        VideoError: the file cannot be opened, has no video, or no frame decodes.
    """
    frame = SegmentReader(path, seconds).first_frame()
    if frame is None:
        raise VideoError("no frame decodes")
    return frame
