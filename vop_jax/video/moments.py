"""The moments of a video file, and the decoding of many of its segments in one pass.

Worker processes import this file, so it imports nothing heavy.
"""

import bisect
import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np

from vop_jax.errors import VideoError
from vop_jax.storage import remote
from vop_jax.storage.files import is_remote
from vop_jax.video.crops import eval_crop
from vop_jax.video.decode import SegmentReader
from vop_jax.video.sampling import sample_indices, stored_indices
from vop_jax.video.stream import as_video_error

Segment = tuple[float, float]  # seconds [start, end)
WHOLE_FILE: Segment = (0.0, math.inf)

# Seconds beyond which seeking to the F frames of a clip beats decoding the file from end to end.
LONG_FILE = 120.0
# Pictures and seconds of video of one task: they bound the memory of a worker.
MAX_PICTURES, MAX_SECONDS = 192, 300.0


@dataclasses.dataclass(frozen=True)
class FrameSpec:
    """Which frames of a segment a model sees, and their size.

    Attributes:
        frames: F.
        image_size: S, the side of the square pictures.
        short_side, sampling: see `frames.read_frames`.
        fps: sample the F from this many frames a second; 0: from all frames.
    """

    frames: int
    image_size: int
    short_side: int = 256
    sampling: str = "uniform"
    fps: float = 0.0


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the packets of a file say without being decoded.

    Attributes:
        digest: SHA-256 of the file's bytes.
        duration: seconds, to the end of the last frame.
        clip_times: seconds of the F frames of the whole clip; [] where packets have no times.
        frame_times: seconds of all frames, ascending: float64 [n].
    """

    digest: str
    duration: float
    clip_times: list[float]
    frame_times: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeTask:
    """What a worker decodes of a file: `segments` in one pass, or the frames at `times` by seeking.

    Frames at `times` make one clip. If seeking fails, `segments` (default: the whole file) are
    decoded instead.
    """

    path: str
    spec: FrameSpec
    segments: tuple[Segment, ...] = ()
    times: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecodedSegments:
    """The pictures of a task.

    Attributes:
        pixels: uint8 [n, S, S, 3], each picture once.
        times: seconds of each picture.
        rows: for each segment the F rows of `pixels`, or None where it shows no frame.
        shots: the last of these segments, which were found while the file was decoded.
    """

    pixels: np.ndarray
    times: list[float]
    rows: Sequence[list[int] | None]
    shots: Sequence[Segment] = ()

    def clip(self, number: int) -> np.ndarray | None:
        """uint8 [F, S, S, 3] of segment `number`; None where it shows no frame."""
        rows = self.rows[number]
        return None if rows is None else self.pixels[rows]


def list_moments(info: VideoInfo, window: float, stride: float) -> list[Segment]:
    """Segments of `window` seconds, `stride` seconds apart, that show a frame.

    The last one reaches the end of the file. The list is empty if one moment holds the whole clip.
    """
    duration, times = info.duration, info.frame_times
    if not window or duration <= window:
        return []
    # Numbers of the moments that show each frame, computed from the frames: a slide show may have
    # a few frames in days, and millions of moments without any.
    latest = np.unique(np.floor(times / stride).astype(int))
    per_frame = math.ceil(window / stride) + 1
    new = np.minimum(np.diff(latest, prepend=latest[:1] - per_frame), per_frame)
    numbers = np.concatenate(list(map(np.arange, latest + 1 - new, latest + 1)))
    count = math.ceil((duration - window) / stride - 1e-9)
    starts = [*(numbers[(numbers >= 0) & (numbers < count)] * stride), duration - window]
    edges = [(round(float(start), 3), round(float(start) + window, 3)) for start in starts]
    return [edge for edge in edges if np.diff(np.searchsorted(times, edge))[0]]


def inspect_video(path: str | os.PathLike, spec: FrameSpec) -> VideoInfo:
    """Reads a file without decoding it.

    Raises:
        VideoError: the file is missing or no video.
    """
    times = SegmentReader(path).packet_times()
    digest = _digest(os.fspath(path))
    if not times:
        return VideoInfo(digest, 0.0, [], np.zeros(0))
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.04
    duration = math.ceil(1e3 * (times[-1] + gap) - 1e-3) / 1e3  # rounded up: [start, end) is open
    clip_times = [times[i] for i in _sample(times, 0.0, spec)]
    return VideoInfo(digest, duration, clip_times, np.array(times))


def _digest(path: str) -> str:
    """SHA-256 of the content; of a remote file, which costs time to read, of the store's tag."""
    with as_video_error():
        if is_remote(path):
            return remote.describe(path).digest
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def plan_tasks(
    path: str, info: VideoInfo, moments: Sequence[Segment], spec: FrameSpec
) -> list[DecodeTask]:
    """Tasks that decode a file's whole clip, then its moments; few frames are decoded twice."""
    per_task = max(1, MAX_PICTURES // spec.frames)
    if info.duration <= LONG_FILE and len(moments) < per_task:
        return [DecodeTask(path, spec, (WHOLE_FILE, *moments))]
    groups: list[list[Segment]] = []
    for moment in moments:
        group = groups[-1] if groups else []
        if not group or len(group) == per_task or moment[1] - group[0][0] > MAX_SECONDS:
            groups.append([moment])
        else:
            group.append(moment)
    return [
        DecodeTask(path, spec, times=tuple(info.clip_times)),
        *(DecodeTask(path, spec, tuple(group)) for group in groups),
    ]


def decode_task(task: DecodeTask) -> DecodedSegments:
    """The pictures of a task: the same frames as `frames.read_frames` gives of each segment.

    Raises:
        VideoError: the file cannot be used, and why.
    """
    if not task.times:
        return _decode_segments(task.path, task.segments, task.spec)
    frames: dict[float, np.ndarray] = {}
    for time in dict.fromkeys(task.times):
        reader = SegmentReader(task.path, time, time + 1e-6, task.spec.short_side)
        decoded = reader.decode([0])
        if not decoded:  # the index of the file is wrong, or its packets do not decode
            return _decode_segments(task.path, task.segments or (WHOLE_FILE,), task.spec)
        frames[time] = decoded[0]
    rows = {time: row for row, time in enumerate(frames)}
    pixels = eval_crop(list(frames.values()), task.spec.image_size)
    return DecodedSegments(pixels, list(frames), [[rows[time] for time in task.times]])


def read_segment(
    path: str | os.PathLike, spec: FrameSpec, start: float = 0.0, end: float = math.inf
) -> tuple[np.ndarray, list[float]]:
    """(uint8 [F, S, S, 3], seconds of each frame) of a segment; a long one is read by seeking.

    Raises:
        VideoError: the file cannot be used, or shows nothing between `start` and `end`.
    """
    path = os.fspath(path)
    times = SegmentReader(path, start, end).packet_times()
    by_seeking = bool(times) and times[-1] - times[0] > LONG_FILE
    clip_times = [times[i] for i in _sample(times, start, spec)] if by_seeking else []
    decoded = decode_task(DecodeTask(path, spec, ((start, end),), tuple(clip_times)))
    rows = decoded.rows[0]
    if rows is None:
        raise VideoError(f"no frame between {start:g} and {end:g} s")
    return decoded.pixels[rows], [decoded.times[row] for row in rows]


def _decode_segments(path: str, segments: Sequence[Segment], spec: FrameSpec) -> DecodedSegments:
    """Decodes from the start of the first segment to the end of the last."""
    first, last = min(start for start, _ in segments), max(end for _, end in segments)
    reader = SegmentReader(path, first, last, spec.short_side)

    def decode(times: list[float]) -> tuple[list[list[int] | None], dict[int, np.ndarray]]:
        indices = [sample_segment(times, segment, spec) for segment in segments]
        return indices, reader.decode({i for chosen in indices for i in chosen or ()})

    # Packets nearly always predict the frames that decode; where they do not, decode again.
    indices, frames = decode(reader.packet_times())
    if [sample_segment(reader.times, segment, spec) for segment in segments] != indices:
        indices, frames = decode(reader.times)
    if not reader.times and WHOLE_FILE in segments:
        raise VideoError("no frame decodes")
    rows = {index: row for row, index in enumerate(frames)}
    return DecodedSegments(
        pixels=eval_crop(list(frames.values()), spec.image_size),
        times=[reader.times[index] for index in frames],
        rows=[None if chosen is None else [rows[i] for i in chosen] for chosen in indices],
    )


def sample_segment(times: Sequence[float], segment: Segment, spec: FrameSpec) -> list[int] | None:
    """Indices of the F frames of a segment, of frames shown at `times`; None: it has none."""
    start, end = segment
    # A frame of a negative time belongs to the beginning of the file.
    low = bisect.bisect_left(times, start if start > 0 else -math.inf)
    high = bisect.bisect_left(times, end)
    if low == high:
        return None
    return [low + i for i in _sample(times[low:high], start, spec)]


def _sample(times: Sequence[float], start: float, spec: FrameSpec) -> list[int]:
    """Indices of the F frames of a clip that begins at `start` and shows frames at `times`."""
    candidates = list(range(len(times)))
    if spec.fps:
        candidates = stored_indices(times, start, spec.fps, spec.sampling)
    indices = sample_indices(len(candidates), spec.frames, spec.sampling)
    return [candidates[i] for i in indices]
