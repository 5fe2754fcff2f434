"""The one reader of segments of video files: which frames a segment has and what they show.

Worker processes import this file, so it stays light.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vop_jax.errors import VideoError
from vop_jax.video.crops import resize, resize_short_side
from vop_jax.video.stream import TimedFrames, VideoStream, as_video_error, open_stream

SEEK_FROM = 10.0  # seconds; reading up to an earlier start is faster than seeking to it
DAMAGED = 0.05  # share of packets that may not decode; decoders recover at the next key frame
# What may be missing at the end of a file that lacks bytes: a share of the segment, and seconds
# for a segment that shows few frames.
LOST_SHARE, LOST_SECONDS = 0.1, 0.5
UNSPECIFIED = 2  # FFmpeg's colorspace that means: by the size of the frame


class SegmentReader:
    """Reads the frames of a file whose times are in [start, end).

    Times are seconds since the file begins, as players count them. All methods raise VideoError
    if the file cannot be opened, is no video, or is damaged or truncated.

    Attributes:
        times: of the frames that the last `decode`, or `frames`, saw, in the order of display.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        start: float = 0.0,
        end: float = math.inf,
        short_side: int | None = None,
    ):
        if math.isnan(start) or math.isnan(end):
            raise VideoError(f"a segment from {start:g} to {end:g} s; both are seconds")
        self.path, self.short_side = os.fspath(path), short_side
        # A frame of a negative time belongs to the beginning of the file.
        self.start, self.end = start if start > 0 else -math.inf, end
        self.times: list[float] = []

    def packet_times(self) -> list[float]:
        """Times of the frames, ascending, as packets say: cheap, and nearly always right."""
        times, begun = list[float](), False
        with open_stream(self.path) as stream:
            if self.start > SEEK_FROM:
                stream.seek(self.start)
            for packet in stream.packets():
                time, begun = stream.packet_time(packet), begun or packet.is_keyframe
                if self.start <= time < self.end and begun and not packet.is_discard:
                    times.append(time)
                if packet.dts is not None and stream.seconds(packet.dts) >= self.end:
                    break  # no frame is shown before it is decoded
        return sorted(times)

    def decode(self, indices: Iterable[int]) -> dict[int, np.ndarray]:
        """uint8 [h, w, 3] of the segment's frames of these indices, all of the first one's size."""
        indices, frames = frozenset(indices), dict[int, np.ndarray]()
        # One for all frames: creating it costs more than its work, and threads of its own most.
        reformatter = VideoReformatter()
        with as_video_error():
            for index, (_, frame) in enumerate(self.frames()):
                if index in indices:
                    pixels = upright(frame, reformatter, self.short_side)
                    first = next(iter(frames.values()), pixels)
                    frames[index] = resize(pixels, first.shape[1], first.shape[0])
        return frames

    def frames(self) -> TimedFrames:
        """(time, frame) of the segment's frames, in the order of display."""
        self.times = []
        with self._open_at_start() as (stream, timed_frames):
            for time, frame in timed_frames:
                if time >= self.end:
                    break
                if time >= self.start:
                    self.times.append(time)
                    yield time, frame
            else:
                self._check_complete(stream)
            if stream.damaged > max(1, DAMAGED * stream.read):
                counts = f"{stream.damaged} of {stream.read}"
                raise VideoError(f"damaged: {counts} packets do not decode")

    def first_frame(self) -> np.ndarray | None:
        """uint8 [h, w, 3] on display at the start of the segment; None if no frame decodes."""
        current = None
        with self._open_at_start() as (_, timed_frames):
            for time, frame in timed_frames:
                if current is not None and time > self.start:
                    break
                current = frame
            if current is None:
                return None
            return upright(current, VideoReformatter(), self.short_side)

    @contextlib.contextmanager
    def _open_at_start(self) -> Iterator[tuple[VideoStream, TimedFrames]]:
        """The stream, and its frames from one at or before the start on, or from the first.

        Indexes are wrong and some key frames are none: a quick way to the start counts only if it
        finds a frame at or before the start; else the next slower way is tried.
        """
        ways: list[Callable[[VideoStream, float], TimedFrames]] = [VideoStream.all_frames]
        if self.start > 0:
            ways.insert(0, VideoStream.frames_from)
        if self.start > SEEK_FROM:
            ways.insert(0, VideoStream.frames_by_seeking)
        for way in ways:
            with open_stream(self.path) as stream:
                frames = way(stream, self.start)
                first = next(frames, None)
                if way is VideoStream.all_frames or (first and first[0] <= self.start):
                    yield stream, itertools.chain([first] if first else [], frames)
                    return

    def _check_complete(self, stream: VideoStream) -> None:
        """Raises VideoError if the frames end before the segment because bytes are missing."""
        if not self.times or stream.has_all_bytes(self.path):
            return
        is_whole_file = self.start < 0 and math.isinf(self.end)
        stated = stream.stated_seconds()
        end = min(stated, self.end)
        may_lack = LOST_SHARE * (end - max(self.start, 0.0))
        if not is_whole_file:
            may_lack = max(may_lack, LOST_SECONDS)
        if stream.end < end - may_lack:
            raise VideoError(f"truncated: {stream.end:.1f} s of {stated:.1f} s decode")


def upright(
    frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int | None
) -> np.ndarray:
    """uint8 RGB [h, w, 3], rotated and mirrored for display."""
    pixels = convert(frame, reformatter, format="rgb24")
    # A pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, c, d = _display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    pixels = np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return resize_short_side(pixels, short_side, enlarge=False) if short_side else pixels


def convert(frame: av.VideoFrame, reformatter: VideoReformatter, **target: Any) -> np.ndarray:
    """The pixels of a frame in another format or size, as `VideoReformatter.reformat` takes it."""
    try:
        converted = reformatter.reformat(frame, threads=1, **target)
    except av.error.FFmpegError:  # FFmpeg has no conversion for the tag: ignore the tag
        frame.colorspace = UNSPECIFIED
        converted = reformatter.reformat(frame, threads=1, **target)
    pixels: np.ndarray = converted.to_ndarray()
    return pixels


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """(a, b, c, d), by which a frame is rotated and mirrored for display."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know other side data, such as EXIF: the angle is left
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    a, b, _, c, d, *_ = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)
    return float(a), float(b), float(c), float(d)
