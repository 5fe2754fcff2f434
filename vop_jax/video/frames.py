"""Videos become sampled frames: from files, or from folders of pictures."""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from vop_jax.errors import VideoError
from vop_jax.video.decode import SegmentReader, as_video_error
from vop_jax.video.files import stat
from vop_jax.video.images import list_pictures, read_picture
from vop_jax.video.sampling import sample_indices, stored_indices


@dataclasses.dataclass(frozen=True)
class Frames:
    """Sampled frames of a clip.

    Attributes:
        pixels: uint8 RGB [h, w, 3] each, upright.
        indices: which decoded frame of the clip each is, from 0.
        timestamps: seconds in the file; NaN where nothing tells.
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
        fps: instead take so many frames a second, as many as there are.
        short_side: shrink larger frames to this, in pixels.
        sampling: see `sampling.sample_indices` and `sampling.stored_indices`.
        folder_fps: pictures a second in a folder; 0: not known.

    Raises:
        VideoError: the file cannot be opened, has no video, is damaged or truncated, or shows
            nothing between `start` and `end`.
    """
    if stat(path).is_directory:
        with as_video_error():
            return _read_folder(path, frames, start, end, fps, short_side, sampling, folder_fps)
    clip = SegmentReader(path, start or 0.0, math.inf if end is None else end, short_side)
    # Sequential decoding beats seeking, but which frames to keep depends on how many there are, and
    # when they are shown. Packets tell cheaply and nearly always rightly; if not, again.
    indices = _chosen(clip.packet_times(), start or 0.0, frames, fps, sampling)
    kept = clip.decode(indices)
    decoded = _chosen(clip.times, start or 0.0, frames, fps, sampling)
    if decoded != indices:
        indices, kept = decoded, clip.decode(decoded)
    if not indices:
        raise VideoError(f"no frame decodes{_between(start, end)}")
    times = [clip.times[i] for i in indices]
    return Frames([kept[i] for i in indices], indices, times, len(clip.times))


def read_frame_at(
    path: str | os.PathLike, seconds: float, *, short_side: int | None = None
) -> np.ndarray:
    """The frame shown at a time, the last one of a file that ends before: uint8 RGB [h, w, 3].

    Raises:
        VideoError: the file cannot be opened, has no video, or no frame decodes.
    """
    frame = SegmentReader(path, seconds, short_side=short_side).first_frame()
    if frame is None:
        raise VideoError("no frame decodes")
    return frame


def _read_folder(
    path: str | os.PathLike,
    frames: int,
    start: float | None,
    end: float | None,
    fps: float,
    short_side: int | None,
    sampling: str,
    folder_fps: float,
) -> Frames:
    """The same of a folder of extracted frames."""
    pictures = list_pictures(path)
    if not folder_fps and (fps or start is not None or end is not None):
        raise VideoError("a folder of frames; seconds need config.data.folder_fps")
    times = [i / folder_fps if folder_fps else math.nan for i in range(len(pictures))]
    first, last = start or 0.0, math.inf if end is None else end
    shown = [i for i, time in enumerate(times) if math.isnan(time) or first <= time < last]
    if not shown:
        raise VideoError(f"no frame{_between(start, end)}")
    if fps:
        indices = stored_indices([times[i] for i in shown], first, fps, sampling)
    else:
        indices = sample_indices(len(shown), frames, sampling).tolist()
    pixels = {k: read_picture(pictures[shown[k]], short_side) for k in dict.fromkeys(indices)}
    return Frames(
        [pixels[k] for k in indices], indices, [times[shown[k]] for k in indices], len(shown)
    )


def _between(start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return ""
    return f" between {start or 0:g} and {'the end' if end is None else f'{end:g} s'}"


def _chosen(
    times: Sequence[float], start: float, frames: int, fps: float, sampling: str
) -> list[int]:
    if fps:
        return stored_indices(times, start, fps, sampling)
    return sample_indices(len(times), frames, sampling).tolist() if times else []
