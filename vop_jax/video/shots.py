"""The shots of a video file, found in the same pass that decodes their frames.

A detector of PySceneDetect compares small pictures. Which frames represent a shot is known when it
ends, so frames wait until then. Worker processes import this file, so it imports nothing heavy.
"""

import dataclasses
import itertools
import math
from collections.abc import Container

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vop_jax.errors import VideoError
from vop_jax.video.crops import eval_crop
from vop_jax.video.decode import SegmentReader, convert, upright
from vop_jax.video.moments import (
    WHOLE_FILE,
    DecodedSegments,
    DecodeTask,
    FrameSpec,
    Segment,
    VideoInfo,
    sample_segment,
)
from vop_jax.video.stream import as_video_error

# Seconds. A cut that would leave a shorter shot is ignored, and a longer shot is divided.
SHORTEST, LONGEST = 1.0, 20.0
PART = 120.0  # seconds of a file that one task decodes; bounds the memory of a worker
WAITING = 64 << 20  # bytes of frames that wait for the end of their shot, and at least 2 F frames
INTERVAL = 0.1  # seconds between the pictures that are compared first
WIDTH = 64  # of these pictures
NEIGHBOURS = 2  # pictures before and after a cut, with which the detector compares its change


@dataclasses.dataclass(frozen=True)
class ShotTask:
    """The shots of a part of a file.

    Attributes:
        span: the part, in seconds.
        clip: whether it is the whole file, which is then a clip, too.
    """

    path: str
    spec: FrameSpec
    span: Segment
    clip: bool


def plan_shots(path: str, info: VideoInfo, spec: FrameSpec) -> list[DecodeTask | ShotTask]:
    """Tasks that decode a file's whole clip, then its shots."""
    if not info.duration:  # its packets have no times
        return [DecodeTask(path, spec, (WHOLE_FILE,))]
    if info.duration <= PART:
        return [ShotTask(path, spec, (0.0, info.duration), clip=True)]
    parts = math.ceil(info.duration / PART)
    edges = [round(info.duration * i / parts, 3) for i in range(parts + 1)]
    tasks = [ShotTask(path, spec, span, clip=False) for span in itertools.pairwise(edges)]
    return [DecodeTask(path, spec, times=tuple(info.clip_times)), *tasks]


def decode_shots(task: ShotTask) -> DecodedSegments:
    """The pictures of a task.

    Raises:
        VideoError: the file cannot be used, and why.
    """
    start, end = WHOLE_FILE if task.clip else task.span
    reader = SegmentReader(task.path, start, end, task.spec.short_side)

    def decode(clip: Container[int]) -> _Shots:
        shots = _Shots(task, reader)
        with as_video_error():
            for index, (_, frame) in enumerate(reader.frames()):
                if index in clip:
                    shots.keep(index, frame)
                shots.add(index, frame)
            shots.close(len(reader.times))
        return shots

    if task.clip:
        # As for other segments: packets nearly always predict the frames that decode.
        predicted = sample_segment(reader.packet_times(), WHOLE_FILE, task.spec)
        shots = decode(predicted or ())
        chosen = sample_segment(reader.times, WHOLE_FILE, task.spec)
        if chosen is None:
            raise VideoError("no frame decodes")
        if chosen != predicted:
            shots = decode(chosen)
        found = len(shots.segments) > 1  # one shot is the clip itself
        rows = [chosen, *(shots.rows if found else ())]
    else:
        shots, found = decode(()), True
        rows = shots.rows
    numbers = {index: row for row, index in enumerate(shots.pictures)}
    side = task.spec.image_size
    return DecodedSegments(
        pixels=np.array([*shots.pictures.values()], np.uint8).reshape(-1, side, side, 3),
        times=[reader.times[index] for index in numbers],
        rows=[[numbers[index] for index in row] for row in rows],
        shots=shots.segments if found else (),
    )


class _Shots:
    """Divides the frames of a reader into shots, as they come.

    Attributes:
        segments: the shots that have ended.
        rows: indices of the F frames of each.
        pictures: of these frames, uint8 [S, S, 3] by index.
    """

    def __init__(self, task: ShotTask, reader: SegmentReader):
        self._spec, self._span = task.spec, task.span
        self._reader, self._detector = reader, CutDetector()
        self._reformatter = VideoReformatter()
        self._first, self._every = 0, 1  # the shot's first frame; of its frames, each n-th waits
        self._waiting: dict[int, av.VideoFrame] = {}
        self._most = 0  # frames that wait
        self.segments: list[Segment] = []
        self.rows: list[list[int]] = []
        self.pictures: dict[int, np.ndarray] = {}

    def keep(self, index: int, frame: av.VideoFrame) -> None:
        """Makes the picture of a frame."""
        if index not in self.pictures:
            pixels = upright(frame, self._reformatter, self._spec.short_side)
            self.pictures[index] = eval_crop([pixels], self._spec.image_size)[0]

    def add(self, index: int, frame: av.VideoFrame) -> None:
        """The next frame, whose time the reader has just added to its own."""
        last = index - 1
        if (last - self._first) % self._every:
            self._waiting.pop(last, None)
        self._waiting[index] = frame  # the newest always waits: a shot has a frame
        if not self._most:
            size = sum(plane.buffer_size for plane in frame.planes)
            self._most = max(2 * self._spec.frames, WAITING // size)
        if len(self._waiting) > self._most:
            self._every *= 2
            rare = (i for i in self._waiting if (i - self._first) % self._every == 0 or i == index)
            self._waiting = {i: self._waiting[i] for i in rare}
        times = self._reader.times
        cut = self._detector.add(index, times[index], frame)
        if cut is None and times[index] - times[self._first] >= LONGEST:
            cut = index
        if cut is not None and self._is_far(times[cut]):
            self.close(cut)

    def _is_far(self, cut: float) -> bool:
        """Whether a cut leaves no short shot before or after it."""
        return cut - self._reader.times[self._first] >= SHORTEST and self._span[1] - cut >= SHORTEST

    def close(self, end: int) -> None:
        """Ends the shot before a frame, which is the first of the next."""
        after = self._reader.times[end : end + 1]
        times = self._reader.times[self._first : end]
        if not times:
            return
        begin = self.segments[-1][1] if self.segments else self._span[0]
        # Rounded down, so that the frame itself is in [begin, end) of the next.
        limit = math.floor(1e3 * after[0]) / 1e3 if after else self._span[1]
        ready = np.array([i for i in self._waiting if i < end] or [min(self._waiting)])
        wanted = sample_segment(times, (begin, math.inf), self._spec) or [0]
        row = [int(ready[np.abs(ready - self._first - i).argmin()]) for i in wanted]
        for index in row:
            self.keep(index, self._waiting[index])
        self.segments.append((begin, limit))
        self.rows.append(row)
        self._waiting = {i: frame for i, frame in self._waiting.items() if i >= end}
        self._first, self._every = end, 1


class CutDetector:
    """Finds cuts with PySceneDetect's AdaptiveDetector, in frames that come one by one.

    It compares pictures at intervals; between the two with a cut, the frame that differs most from
    the one before is the first of the new shot.
    """

    def __init__(self):
        import cv2
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        cv2.setNumThreads(1)  # files are decoded in parallel instead
        self._timecode = FrameTimecode
        self._detector = AdaptiveDetector(min_scene_len=0, window_width=NEIGHBOURS)
        self._reformatter = VideoReformatter()
        self._size: dict[str, int] = {}
        self._compared: list[int] = []
        self._recent: dict[int, av.VideoFrame] = {}
        self._due = -math.inf  # seconds of the next picture

    def add(self, index: int, time: float, frame: av.VideoFrame) -> int | None:
        """The first frame of a new shot, at most `NEIGHBOURS` intervals before this frame."""
        self._recent[index] = frame
        if time < self._due:
            return None
        self._due = time + INTERVAL - 1e-3
        # The detector counts frames; the rate means nothing here.
        cuts = self._detector.process_frame(self._timecode(index, 1.0), self._picture(frame))
        self._compared = [*self._compared[-NEIGHBOURS - 1 :], index]
        cut = self._first_frame(cuts[0].frame_num) if cuts else None
        self._recent = {i: x for i, x in self._recent.items() if i >= self._compared[0]}
        return cut

    def _first_frame(self, compared: int) -> int:
        before = self._compared[self._compared.index(compared) - 1]
        pictures = [self._picture(self._recent[i]).astype(int) for i in range(before, compared + 1)]
        changes = [np.abs(b - a).sum() for a, b in itertools.pairwise(pictures)]
        return before + 1 + int(np.argmax(changes))

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 BGR [h, WIDTH, 3], all of one size."""
        height = max(2, round(WIDTH * frame.height / frame.width))
        self._size = self._size or {"width": WIDTH, "height": height}
        return convert(frame, self._reformatter, format="bgr24", interpolation="AREA", **self._size)
