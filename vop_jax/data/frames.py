"""Videos become sampled frames: from files, whose decoding this is, or from folders of pictures."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import av
import av.logging
import numpy as np
from av.video.reformatter import VideoReformatter
from etils import epath

from vop_jax.data.locate import stat
from vop_jax.data.pictures import list_pictures, read_picture
from vop_jax.data.pixels import resize_short_side
from vop_jax.data.sampling import sample_indices
from vop_jax.errors import VideoError

# A file, or a stretch, whose pictures end this share before it should has lost its end.
LOST_END = 0.1
LOST_SECONDS = 0.5  # and of a stretch so much, in which few frames are shown
# Undecodable packets a file may hold, as a share of all; decoders recover at the next key frame.
DAMAGED = 0.05
# A stretch that begins earlier, in seconds, is reached by decoding: some indexes are wrong.
SEEK_FROM = 10.0
COVER = av.stream.Disposition.attached_pic  # of an audio file


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
        fps: instead take the first frame of every 1 / fps seconds, as many as there are.
        short_side: shrink larger frames to this, in pixels.
        sampling: see `sampling.sample_indices`.
        folder_fps: pictures a second in a folder; 0: not known.

    Raises:
        VideoError: the file cannot be opened, has no video, is damaged or truncated, or shows
            nothing between `start` and `end`.
    """
    if stat(path).is_directory:
        return _read_folder(path, frames, start, end, fps, short_side, sampling, folder_fps)
    clip = Stretch(os.fspath(path), start or 0.0, float("inf") if end is None else end, short_side)
    # Sequential decoding beats seeking, but which frames to keep depends on how many there are, and
    # when they are shown. Packets tell cheaply and nearly always rightly; if not, again.
    times = clip.packet_times()
    for _ in range(2):
        indices = _chosen(times, clip.start, frames, fps, sampling)
        taken = clip.decode(indices)
        if len(clip.times) == len(times):
            break
        times = sorted(clip.times)
    if not times:
        raise VideoError(f"no frame decodes{_between(start, end)}")
    # Decoders hand frames out in the order of display, but files such as AVI number them in
    # the order of storage: the k-th frame is shown at the k-th time.
    return Frames([taken[i] for i in indices], indices, [times[i] for i in indices], len(times))


def read_frame_at(
    path: str | os.PathLike, seconds: float, *, short_side: int | None = None
) -> np.ndarray:
    """The frame shown at a time, the last one of a file that ends before: uint8 RGB [h, w, 3].

    Raises:
        VideoError: the file cannot be opened, has no video, or no frame decodes.
    """
    stretch = Stretch(os.fspath(path), seconds, math.inf, short_side)
    frame = stretch.first()
    if frame is None:  # a wrong index led past the last frame
        frame = Stretch(os.fspath(path), 0.0, math.inf, short_side).first()
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
        indices = every([times[i] for i in shown], first, 1 / fps)
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
        return every(times, start, 1 / fps)
    return sample_indices(len(times), frames, sampling).tolist() if times else []


def every(times: Sequence[float], start: float, interval: float) -> list[int]:
    """Which of the times, ascending, are the first at or after a multiple of `interval`."""
    found = []
    due = 0
    for index, time in enumerate(times):
        if index and time - start < due * interval - 1e-6:
            continue
        while due * interval <= time - start + 1e-6:
            due += 1
        found.append(index)
    return found


class Stretch:
    """The part of a file between two times.

    Attributes:
        times: when the frames that the last `decode` saw are shown.
    """

    def __init__(self, path: str, start: float, end: float, short_side: int | None):
        self.path, self.start, self.end, self.short_side = path, start, end, short_side
        self.times: list[float] = []

    @property
    def whole(self) -> bool:
        """Whether it is the file from end to end."""
        return not self.start and math.isinf(self.end)

    def packet_times(self) -> list[float]:
        """When the frames are shown, ascending, as the packets say without being decoded."""
        found = []
        with self._opened() as (container, stream):
            try:
                for packet in container.demux(stream):
                    time = self._time(stream, packet)
                    if packet.size and self.start <= time < self.end:
                        found.append(time)
                    if packet.dts is not None and self._since(stream, packet.dts) >= self.end:
                        break  # nothing is shown before it is decoded
            except av.error.FFmpegError:
                pass  # decoding will find the reason
        return sorted(found)

    def decode(self, wanted: Iterable[int]) -> dict[int, np.ndarray]:
        """Pixels of these of the frames in the stretch, by index."""
        wanted, kept = frozenset(wanted), dict[int, np.ndarray]()
        self.times = []
        bad = packets = 0
        last = 0.0  # when the last frame ends
        # One for all frames: making it costs more than its work, and threads of its own most.
        reformatter = VideoReformatter()
        with self._opened() as (container, stream):
            tick = _tick(stream)
            for packet in self._packets(container, stream):
                packets += 1
                try:
                    decoded = packet.decode()
                except av.error.FFmpegError:
                    bad += 1
                    continue
                for frame in decoded:
                    bad += frame.is_corrupt
                    time = self._time(stream, frame)
                    last = max(last, time + _seconds(frame.duration or 0, tick))
                    if self.start <= time < self.end:
                        if len(self.times) in wanted:
                            kept[len(self.times)] = _upright(frame, reformatter, self.short_side)
                        self.times.append(time)
                if last >= self.end:
                    break
            if bad > DAMAGED * packets:
                raise VideoError(f"damaged: {bad} of {packets} packets do not decode")
            stated = _duration(container, stream)
            finish = min(stated, self.end)
            lost = max(LOST_END * (finish - self.start), 0 if self.whole else LOST_SECONDS)
            if last < finish - lost and self.times:
                raise VideoError(f"truncated: {last:.1f} s of {stated:.1f} s decode")
        return kept

    def first(self) -> np.ndarray | None:
        """The frame shown when the stretch begins, or the last one before its end."""
        shown = None
        with self._opened() as (container, stream):
            for packet in self._packets(container, stream):
                with contextlib.suppress(av.error.FFmpegError):
                    for frame in packet.decode():
                        if shown is not None and self._time(stream, frame) > self.start:
                            return _upright(shown, VideoReformatter(), self.short_side)
                        shown = frame
        return None if shown is None else _upright(shown, VideoReformatter(), self.short_side)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        av.logging.set_level(av.logging.PANIC)  # reasons are raised, not printed
        found = stat(self.path)
        if found.is_directory:
            raise VideoError("a folder, not a video")
        if not found.length:
            raise VideoError("zero bytes")
        file = epath.Path(self.path).open("rb") if "://" in self.path else None
        try:
            with av.open(file or self.path, metadata_errors="replace") as container:
                films = [s for s in container.streams.video if not s.disposition & COVER]
                if not films:
                    raise VideoError("no video stream")
                stream = films[0]
                if stream.codec_context is None:
                    raise VideoError("unknown codec")
                stream.codec_context.thread_count = 1  # clips are decoded in parallel instead
                if self.start > SEEK_FROM:
                    first = int(self.start / _tick(stream)) + (stream.start_time or 0)
                    with contextlib.suppress(OverflowError):  # later than any frame
                        container.seek(first, stream=stream)  # to the key frame before it
                yield container, stream
        except av.error.FFmpegError as error:
            raise VideoError(f"not readable as video ({error.strerror})") from None
        finally:
            if file:
                file.close()

    def _packets(self, container, stream) -> Iterator[av.Packet]:
        """Packets to the end of the file; a file that breaks off ends there."""
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                return
            if packet is None:
                return
            yield packet

    def _time(self, stream: av.VideoStream, shown: av.Packet | av.VideoFrame) -> float:
        """Seconds since the beginning of the video."""
        pts = shown.dts if shown.pts is None else shown.pts
        if pts is None:
            return self.times[-1] if self.times else 0.0
        return self._since(stream, pts)

    def _since(self, stream: av.VideoStream, units: int) -> float:
        return _seconds(units - (stream.start_time or 0), _tick(stream))


def _seconds(units: int, tick: Fraction) -> float:
    """`float(units * tick)`, without making fractions of each frame's time."""
    return units * tick.numerator / tick.denominator


def _tick(stream: av.VideoStream) -> Fraction:
    """Seconds of one unit of the stream's time stamps."""
    return stream.time_base or Fraction(1, av.time_base)


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """The stated seconds of video, 0 where the file does not say."""
    if container.format.name == "avi" and stream.frames:
        return float(stream.frames * _tick(stream))  # its duration is a guess by the file's size
    if stream.duration:
        return float(stream.duration * _tick(stream))
    if tag := stream.metadata.get("DURATION"):  # Matroska and webm: 00:00:05.240000000
        with contextlib.suppress(ValueError):  # damaged: it does not say
            hours, minutes, seconds = map(float, tag.split(":"))
            return 3600 * hours + 60 * minutes + seconds
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return 0.0


def _upright(
    frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int | None
) -> np.ndarray:
    pixels = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if turns := round(frame.rotation / 90) % 4:
        pixels = np.rot90(pixels, turns)
    if short_side:
        pixels = resize_short_side(np.ascontiguousarray(pixels), short_side, enlarge=False)
    return np.ascontiguousarray(pixels)
