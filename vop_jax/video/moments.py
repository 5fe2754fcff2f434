"""A video as a clip and as moments of it: where they are, and many of them in one pass.

Worker processes import this file: it stays light.
"""

import bisect
import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np

from vop_jax.errors import VideoError
from vop_jax.video.crops import eval_crop
from vop_jax.video.decode import Segment, as_video_error
from vop_jax.video.sampling import sample_indices, stored_indices

Span = tuple[float, float]  # seconds [start, end)
WHOLE: Span = (0.0, math.inf)

# A longer file is not decoded from end to end for the few frames of its clip.
LONG = 120.0
# Pictures that one task brings, and seconds that it decodes: so much is in memory per worker.
PICTURES, SECONDS = 192, 300.0


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a segment of video becomes F pictures, as in training.

    Attributes:
        frames: F.
        image_size: S, the pictures' side.
        short_side, sampling: see `frames.read_frames`.
        fps: the F are taken of so many frames a second; 0: of all.
    """

    frames: int
    image_size: int
    short_side: int = 256
    sampling: str = "uniform"
    fps: float = 0.0


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a file holds, as its packets say without being decoded.

    Attributes:
        digest: of its bytes.
        duration: seconds, to the end of its last frame.
        times: seconds of the F frames of its clip; [] where only decoding tells.
        shown: seconds of all frames, ascending: float64 [n].
    """

    digest: str
    duration: float
    times: list[float]
    shown: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker decodes: segments in one pass, or frames at some times by seeking."""

    path: str
    reading: Reading
    spans: tuple[Span, ...] = ()
    times: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What it brings.

    Attributes:
        pixels: uint8 [N, S, S, 3], each picture once.
        times: seconds of each.
        clips: for each span the F rows of `pixels`, or None where no frame is shown in it.
    """

    pixels: np.ndarray
    times: list[float]
    clips: list[list[int] | None]

    def clip(self, number: int) -> np.ndarray | None:
        """uint8 [F, S, S, 3] of a span."""
        rows = self.clips[number]
        return None if rows is None else self.pixels[rows]


def spans_of(found: Survey, window: float, stride: float) -> list[Span]:
    """Moments of `window` seconds, `stride` apart, that show a frame; the last reaches the end.

    None where a single one would be the whole clip.
    """
    duration, shown = found.duration, found.shown
    if not window or duration <= window:
        return []
    # Asked of each frame is which moments show it: a few frames may be spread over days.
    latest = np.unique(np.floor(shown / stride).astype(int))
    most = math.ceil(window / stride) + 1  # moments that show one frame
    new = np.minimum(np.diff(latest, prepend=latest[:1] - most), most)  # to the frame before
    numbers = np.concatenate(list(map(np.arange, latest + 1 - new, latest + 1)))
    count = math.ceil((duration - window) / stride - 1e-9)
    starts = [*(numbers[(numbers >= 0) & (numbers < count)] * stride), duration - window]
    edges = [(round(float(start), 3), round(float(start) + window, 3)) for start in starts]
    return [edge for edge in edges if np.diff(np.searchsorted(shown, edge))[0]]


def survey(path: str | os.PathLike, reading: Reading) -> Survey:
    """Reads a file without decoding it.

    Raises:
        VideoError: it is not there or no video.
    """
    times = Segment(path).packet_times()
    with as_video_error(), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not times:
        return Survey(digest, 0.0, [], np.zeros(0))
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.04
    duration = math.ceil(1e3 * (times[-1] + gap) - 1e-3) / 1e3  # no less: the end is not shown
    chosen = [times[i] for i in _chosen(times, 0.0, reading)]
    return Survey(digest, duration, chosen, np.array(times))


def tasks_of(path: str, found: Survey, spans: Sequence[Span], reading: Reading) -> list[Task]:
    """The work of a file: its clip first, then `spans`, each frame decoded once or nearly so."""
    per_task = max(1, PICTURES // reading.frames)
    if found.duration <= LONG and len(spans) < per_task:
        return [Task(path, reading, (WHOLE, *spans))]
    groups: list[list[Span]] = []
    for span in spans:
        group = groups[-1] if groups else []
        if not group or len(group) == per_task or span[1] - group[0][0] > SECONDS:
            groups.append([span])
        else:
            group.append(span)
    return [
        Task(path, reading, times=tuple(found.times)),
        *(Task(path, reading, tuple(group)) for group in groups),
    ]


def read_pictures(task: Task) -> Pictures:
    """Decodes a task: the same frames as `frames.read_frames` gives of each span.

    Raises:
        VideoError: the file cannot be used, and why.
    """
    if not task.times:
        return _read_spans(task)
    kept: dict[float, np.ndarray] = {}
    for time in dict.fromkeys(task.times):
        at = Segment(task.path, time, time + 1e-6, task.reading.short_side)
        pixels = next(iter(at.decode([0]).values()), None)
        if pixels is None:  # its index is wrong, or its packets are no frames: all in their order
            return _read_spans(dataclasses.replace(task, times=(), spans=task.spans or (WHOLE,)))
        kept[time] = pixels
    rows = {time: row for row, time in enumerate(kept)}
    clip = [rows[time] for time in task.times]
    return _cropped(list(kept.values()), list(kept), [clip], task.reading)


def read_segment(
    path: str | os.PathLike, reading: Reading, start: float = 0.0, end: float = math.inf
) -> tuple[np.ndarray, list[float]]:
    """(uint8 [F, S, S, 3], seconds of each) of a segment of a file; of a long one by seeking.

    Raises:
        VideoError: the file cannot be used, or shows nothing between `start` and `end`.
    """
    path = os.fspath(path)
    times = Segment(path, start, end).packet_times()
    chosen = [times[i] for i in _chosen(times, start, reading)] if times else []
    seek = bool(times) and times[-1] - times[0] > LONG
    found = read_pictures(Task(path, reading, ((start, end),), tuple(chosen) if seek else ()))
    rows = found.clips[0]
    if rows is None:
        raise VideoError(f"no frame between {start:g} and {end:g} s")
    return found.pixels[rows], [found.times[row] for row in rows]


def _read_spans(task: Task) -> Pictures:
    """Decodes from the beginning of the first span to the end of the last."""
    reading = task.reading
    first, last = min(s for s, _ in task.spans), max(e for _, e in task.spans)
    segment = Segment(task.path, first, last, reading.short_side)
    # Packets tell nearly always what decoding will give; if not, what it gave.
    expected = segment.packet_times()
    plan = [_within(expected, span, reading) for span in task.spans]
    kept = segment.decode(_all(plan))
    decoded = [_within(segment.times, span, reading) for span in task.spans]
    if decoded != plan:
        plan, kept = decoded, segment.decode(_all(decoded))
    if not segment.times and WHOLE in task.spans:
        raise VideoError("no frame decodes")
    rows = {index: row for row, index in enumerate(kept)}
    clips = [None if indices is None else [rows[i] for i in indices] for indices in plan]
    times = [segment.times[index] for index in kept]
    return _cropped(list(kept.values()), times, clips, reading)


def _all(plan: list[list[int] | None]) -> set[int]:
    return {i for indices in plan for i in indices or ()}


def _within(times: Sequence[float], span: Span, reading: Reading) -> list[int] | None:
    """Which of the frames shown at `times` are the F of a span."""
    start = span[0] if span[0] > 0 else -math.inf  # nothing is before the beginning
    low, high = (bisect.bisect_left(times, edge) for edge in (start, span[1]))
    if low == high:
        return None
    return [low + i for i in _chosen(times[low:high], span[0], reading)]


def _chosen(times: Sequence[float], start: float, reading: Reading) -> list[int]:
    candidates = list(range(len(times)))
    if reading.fps:
        candidates = stored_indices(times, start, reading.fps, reading.sampling)
    indices = sample_indices(len(candidates), reading.frames, reading.sampling)
    return [candidates[i] for i in indices]


def _cropped(
    frames: list[np.ndarray], times: list[float], clips: list[list[int] | None], reading: Reading
) -> Pictures:
    size = reading.image_size
    pixels = eval_crop(frames, size) if frames else np.zeros((0, size, size, 3), np.uint8)
    return Pictures(pixels, times, clips)
