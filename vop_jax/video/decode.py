"""A segment of a video file: which frames it has and what they show. The one reader of videos.

It trusts frames, not statements: a frame belongs to the segment by its own time, and what a file
says of its length, its index or its colours is used only where frames bear it out.

Worker processes import this file: it stays light.
"""

import collections
import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from etils import epath

from vop_jax.errors import VideoError
from vop_jax.video.crops import resize, resize_short_side
from vop_jax.video.files import stat, stated_bytes

# What may be opened: formats that hold their frames themselves. Playlists and image sequences
# name other files and addresses, which a file from anywhere shall not have read.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,vob,asf,flv,live_flv,"
    "f4v,ogg,gif,apng,rm,dv,mxf,nut,ivf,swf,wtv,nsv,gxf,nuv,pva,ty,rpl,roq,smk,bink,cine,flic,amv,"
    "h261,h263,h264,hevc,vvc,m4v,mpjpeg,mjpeg,av1,obu,vc1,vc1test,cavsvideo,dirac,yuv4mpegpipe,"
    "image2,jpeg_pipe,png_pipe,webp_pipe,webp,bmp_pipe,tiff_pipe,jpegxl_pipe,jpegxl_anim,gif_pipe"
)
OPTIONS = {"format_whitelist": FORMATS, "pattern_type": "none"}  # a picture's name is its own
COVER = av.stream.Disposition.attached_pic  # of an audio file
DEFAULT = av.stream.Disposition.default
SAMPLE = 1000  # packets in which one sees which of several streams is the film
# FFmpeg's flags of formats: parts may be of several clocks (MPEG-TS, MPEG-PS, Ogg); no stamps.
TS_DISCONT, NO_TIMESTAMPS = 0x200, 0x80
REORDERED = 8  # frames of an AVI that are stored ahead of those shown before them, at most
UNSPECIFIED = 2  # a frame's colorspace: that of its size is taken

# Seconds from which a segment's beginning is sought: before, reading up to it is quicker.
SEEK_FROM = 10.0
# Steps between packets, in seconds, at which the clock was set anew, as FFmpeg takes them: a still
# picture may last for hours, in formats that are spliced for seconds, and time does not run back.
LEAP, SPLICE, BACK = 30 * 3600.0, 10.0, 1.0
# Undecodable packets a file may hold, as a share of all; decoders recover at the next key frame.
DAMAGED = 0.05
# What may be missing at the end of a file that lacks bytes, as a share of the segment.
LOST_END = 0.1
LOST_SECONDS = 0.5  # and of a segment so much, in which few frames are shown

# What PyAV, FFmpeg, epath, NumPy and Python raise over files from anywhere.
FOREIGN = (
    *(av.error.FFmpegError, OSError, ArithmeticError, LookupError, ValueError),
    *(ImportError, MemoryError, RuntimeError),
)


class SegmentReader:
    """The frames of a file whose times are in [start, end).

    Times are seconds since the file begins, as players count them. All methods raise VideoError
    if the file cannot be opened, is no video, or is damaged or truncated.

    Attributes:
        times: of the frames that the last `decode` saw, in the order of display.
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
        # Nothing is before the beginning: what is shown earlier, by a negative time, counts too.
        self.start, self.end = start if start > 0 else -math.inf, end
        self.times: list[float] = []

    def packet_times(self) -> list[float]:
        """When frames are shown, ascending, as packets say: cheap, and nearly always right."""
        times, begun = list[float](), False
        with _opened(self.path) as video:
            if self.start > SEEK_FROM:
                video.seek(self.start)
            for packet in video.packets():
                time, begun = video.packet_time(packet), begun or packet.is_keyframe
                if self.start <= time < self.end and begun and not packet.is_discard:
                    times.append(time)
                if packet.dts is not None and video.seconds(packet.dts) >= self.end:
                    break  # nothing is shown before it is decoded
        return sorted(times)

    def decode(self, wanted: Iterable[int]) -> dict[int, np.ndarray]:
        """uint8 [h, w, 3] of these of the segment's frames, by index; all of the first's size."""
        wanted, kept = frozenset(wanted), dict[int, np.ndarray]()
        self.times = []
        # One for all frames: making it costs more than its work, and threads of its own most.
        reformatter = VideoReformatter()
        with self._reading() as (video, frames):
            for time, frame in frames:
                if time >= self.end:
                    break
                if time < self.start:
                    continue
                if len(self.times) in wanted:
                    pixels = _upright(frame, reformatter, self.short_side)
                    kept[len(self.times)] = _of_size(pixels, kept)
                self.times.append(time)
            else:
                self._check_complete(video)
            if video.bad > max(1, DAMAGED * video.read):
                raise VideoError(f"damaged: {video.bad} of {video.read} packets do not decode")
        return kept

    def first_frame(self) -> np.ndarray | None:
        """uint8 [h, w, 3] shown when the segment begins: its frame then, or the last before."""
        shown = None
        with self._reading() as (_, frames):
            for time, frame in frames:
                if shown is not None and time > self.start:
                    break
                shown = frame
            return None if shown is None else _upright(shown, VideoReformatter(), self.short_side)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple["Video", Iterator[tuple[float, av.VideoFrame]]]]:
        """The video and its (seconds, frame) from one at or before the start on, or from its first.

        Indexes are wrong and key frames are not what they are called: by whichever way the frames
        are reached, a quick one counts only if a key frame at or before the start comes of it.
        """
        ways: list[Callable[[Video, float], Iterator]] = [Video.all_frames]
        if self.start > 0:
            ways.insert(0, Video.frames_from)
        if self.start > SEEK_FROM:
            ways.insert(0, Video.frames_sought)
        for way in ways:
            with _opened(self.path) as video:
                frames = way(video, self.start)
                first = next(frames, None)
                if way is Video.all_frames or (first and first[0] <= self.start):
                    yield video, itertools.chain([first] if first else [], frames)
                    return

    def _check_complete(self, video: "Video") -> None:
        """Of a file whose frames end before the segment does."""
        if not self.times or video.has_all_bytes(self.path):
            return
        last = video.end
        whole = self.start < 0 and math.isinf(self.end)
        stated = video.stated_seconds()
        finish = min(stated, self.end)
        lost = max(LOST_END * (finish - max(self.start, 0.0)), 0 if whole else LOST_SECONDS)
        if last < finish - lost:
            raise VideoError(f"truncated: {last:.1f} s of {stated:.1f} s decode")


class Video:
    """The video stream of an open file, read once from front to back.

    Attributes:
        read, bad: packets from the first key frame on, and those that did not decode.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream):
        self.container, self.stream = container, stream
        stream.codec_context.thread_count = 1  # clips are decoded in parallel instead
        self._tick = tick = stream.time_base or Fraction(1, av.time_base)  # of the stamps
        self._up, self._down = tick.numerator, tick.denominator  # fractions are slow
        self.read = self.bad = 0
        self._origin = _origin(container, stream, tick)
        self._unknown = stream.start_time is None  # of one frame: the first packet has it
        rate = stream.guessed_rate or stream.average_rate or 25
        self._interval = max(1, round(1 / (rate * tick)))
        leap = SPLICE if container.format.flags & TS_DISCONT else LEAP
        self._leap, self._back = int(leap / tick), int(BACK / tick)
        self._shift = 0  # of the stamps, which closes leaps
        self._last: int | None = None  # stamp of the last packet
        self._due = 0  # and of the next by its stated duration, if there is no leap
        self._counted = self._origin  # stamp of a packet that has none
        self._next = self._origin  # of a frame that has none
        # AVI numbers its packets in the order of storage; H.264 frames are shown in another one.
        self._stored = collections.deque[int]() if container.format.name == "avi" else None
        self._first = set[int | None]()  # an AVI's first packets that decode, by their stamps

    def seconds(self, stamp: int) -> float:
        """When a stamp is, since the file begins."""
        return (stamp - self._origin) * self._up / self._down

    def packet_time(self, packet: av.Packet) -> float:
        """When what a packet holds is shown."""
        stamp = packet.dts if packet.pts is None or self._stored is not None else packet.pts
        if stamp is None:
            stamp = self._counted
        self._counted = stamp + (packet.duration or self._interval)
        return self.seconds(stamp)

    def packets(self) -> Iterator[av.Packet]:
        """Packets to where the file ends, or breaks off; leaps of their stamps are closed."""
        # PyAV raises IndexError at the end of a file in which a stream begins midway.
        with contextlib.suppress(av.error.FFmpegError, IndexError):
            for packet in self.container.demux(self.stream):
                if packet.size:
                    if self._unknown and packet.pts is not None:
                        self._origin = self._counted = self._next = packet.pts
                        self._unknown = False
                    self._close_leap(packet)
                    yield packet

    def _close_leap(self, packet: av.Packet) -> None:
        pts, dts = packet.pts, packet.dts
        if dts is None:
            return
        if self._last is not None:
            now = dts + self._shift
            if now < self._last - self._back or now > self._due + self._leap:
                self._shift = self._due - dts
        if self._shift:
            packet.dts = dts = dts + self._shift
            packet.pts = pts = None if pts is None else pts + self._shift
        if pts is not None and abs(pts - dts) > self._leap:
            packet.pts = None  # of beyond a leap, to which decoding has not come
        self._last, self._due = dts, dts + (packet.duration or 0)

    def seek(self, seconds: float) -> None:
        """Goes to a packet before a time, if the file has stamps to find it by, each once."""
        if not self._unknown and not self.container.format.flags & (TS_DISCONT | NO_TIMESTAMPS):
            with contextlib.suppress(av.error.FFmpegError, OverflowError):  # later than any frame
                self.container.seek(self._origin + int(seconds / self._tick), stream=self.stream)

    def frames_sought(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """`frames_from` where the file's index says that `start` is."""
        self.seek(start)
        return self.frames_from(start)

    def frames_from(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames from the last key frame at or before `start` on: earlier ones are not decoded."""
        packets, group = self.packets(), list[av.Packet]()
        for packet in packets:
            if packet.is_keyframe and self.packet_time(packet) <= start:
                group = []
            group.append(packet)
            if packet.dts is None or self.seconds(packet.dts) > start:
                break
        frames = self.frames(itertools.chain(group, packets))
        if self._stored is not None:
            frames = self._behind_lost(frames)
        return itertools.dropwhile(lambda shown: not shown[1].key_frame, frames)

    def _behind_lost(
        self, frames: Iterator[tuple[float, av.VideoFrame]]
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames of an AVI read from within: those that were shown before its key frame are lost.

        They build on frames before it, too. The others come later by as many places.
        """
        ahead = list(itertools.islice(frames, 2 * REORDERED))
        lost = len(self._first - {frame.pts for _, frame in ahead})
        late, rate = lost * self._interval, self._down / self._up
        for time, frame in itertools.chain(ahead, frames):
            yield self.seconds(self._origin + round(time * rate) + late), frame

    def all_frames(self, start: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames from the first that decodes on."""
        return self.frames(self.packets())

    def frames(self, packets: Iterable[av.Packet]) -> Iterator[tuple[float, av.VideoFrame]]:
        """(seconds, frame) of packets, in the order of display."""
        begun = False  # packets before the first key frame lack what they build on: no damage
        for packet in itertools.chain(packets, [None]):  # None brings what the decoder still holds
            if packet is not None:
                begun = begun or packet.is_keyframe
                self.read += begun
                if self._stored is not None and packet.dts is not None:
                    self._stored.append(packet.dts)
            try:
                decoded = self.stream.decode(packet)
            except av.error.FFmpegError:
                self.bad += begun
                if self._stored:
                    self._stored.pop()
                continue
            if self._stored is not None and packet is not None and self.read <= REORDERED:
                self._first.add(packet.pts)
            for frame in decoded:
                self.bad += begun and frame.is_corrupt
                yield self._time(frame), frame

    def _time(self, frame: av.VideoFrame) -> float:
        if self._stored is not None:
            stamp = self._stored.popleft() if self._stored else None
        else:
            stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is None:
            stamp = self._next
        self._next = stamp + (frame.duration or self._interval)
        return self.seconds(stamp)

    @property
    def end(self) -> float:
        """When the last frame ends that was decoded, in seconds."""
        return self.seconds(self._next)

    def has_all_bytes(self, path: str) -> bool:
        """Whether the file is as long as it says, or does not say."""
        with epath.Path(path).open("rb") as file:
            return stated_bytes(file, self.container.format.name) <= stat(path).length

    def stated_seconds(self) -> float:
        """When the video ends as the file says; 0 where it does not."""
        if self.container.format.name == "avi" and self.stream.frames:
            return float(self.stream.frames * self._tick)  # its duration is a guess by the size
        if self.stream.duration:
            return float(self.stream.duration * self._tick)
        if tag := self.stream.metadata.get("DURATION"):  # Matroska and webm: 00:00:05.240000000
            with contextlib.suppress(ValueError):  # damaged: it does not say
                hours, minutes, seconds = map(float, tag.split(":"))
                return 3600 * hours + 60 * minutes + seconds
        if self.container.duration and len(self.container.streams) == 1:
            return self.container.duration / av.time_base
        return 0.0


@contextlib.contextmanager
def as_video_error() -> Iterator[None]:
    """Around the reading of a file: whatever that raises is a VideoError."""
    try:
        yield
    except av.error.ArgumentError:
        raise VideoError("not readable as video (a playlist, or a format not known)") from None
    except av.error.FFmpegError as error:
        raise VideoError(f"not readable as video ({error.strerror})") from None
    except FOREIGN as error:
        reason = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise VideoError(f"not readable as video ({' '.join(reason.split())})") from None


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Video]:
    """The video of a file."""
    av.logging.set_level(av.logging.PANIC)  # reasons are raised, not printed
    with as_video_error(), contextlib.ExitStack() as stack:
        found = stat(path)
        if found.is_directory:
            raise VideoError("a folder, not a video")
        if not found.length:
            raise VideoError("zero bytes")
        container = stack.enter_context(_container(path))
        streams = _main_streams(container)
        number = streams[0].index
        if len(streams) > 1:  # that of which more packets come
            packets = itertools.islice(container.demux(*streams), SAMPLE)
            counts = collections.Counter(packet.stream_index for packet in packets)
            number = max((stream.index for stream in streams), key=lambda index: counts[index])
            container = stack.enter_context(_container(path))
        yield Video(container, next(s for s in container.streams.video if s.index == number))


@contextlib.contextmanager
def _container(path: str) -> Iterator[InputContainer]:
    with contextlib.ExitStack() as stack:
        # `file:` because FFmpeg takes what is before a colon for a protocol.
        file = stack.enter_context(epath.Path(path).open("rb")) if "://" in path else f"file:{path}"
        yield stack.enter_context(
            av.open(file, container_options=OPTIONS, metadata_errors="replace")
        )


def _main_streams(container: InputContainer) -> list[av.VideoStream]:
    """The default video stream, else that with most frames; several where the file does not say.

    A picture that is attached to music is none.
    """
    streams = [s for s in container.streams.video if not s.disposition & COVER]
    if not streams:
        raise VideoError("no video stream")
    decodable = [s for s in streams if s.codec_context is not None]
    if not decodable:
        raise VideoError("unknown codec")
    chosen = [s for s in decodable if s.disposition & DEFAULT] or decodable
    most = max(stream.frames for stream in chosen)
    return [stream for stream in chosen if stream.frames == most]


def _origin(container: InputContainer, stream: av.VideoStream, tick: Fraction) -> int:
    """The stamp from which times are counted, as FFmpeg does.

    It is that of the file's beginning, where sound may begin before the picture; in broadcast
    formats, which have any clock, that of the video's.
    """
    begin = stream.start_time or 0
    if container.start_time is None or container.format.flags & TS_DISCONT:
        return begin
    lead = float(begin * tick) - container.start_time / av.time_base
    # The container's is rounded: the stream's own is exact.
    return begin - round(lead / tick) if lead > 1e-5 else begin


def _upright(
    frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int | None
) -> np.ndarray:
    """uint8 RGB [h, w, 3], turned and mirrored as it is to be shown."""
    try:
        converted = reformatter.reformat(frame, format="rgb24", threads=1)
    except av.error.FFmpegError:  # a tag that no conversion is known for: as if there were none
        frame.colorspace = UNSPECIFIED
        converted = reformatter.reformat(frame, format="rgb24", threads=1)
    pixels: np.ndarray = converted.to_ndarray()
    # A pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, c, d = _display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    pixels = np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return resize_short_side(pixels, short_side, enlarge=False) if short_side else pixels


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """(a, b, c, d), by which a frame is turned and mirrored to be shown."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside data that PyAV has no name for, such as EXIF: its angle alone
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    a, b, _, c, d, *_ = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)
    return float(a), float(b), float(c), float(d)


def _of_size(pixels: np.ndarray, kept: dict[int, np.ndarray]) -> np.ndarray:
    """A frame brought to the size of the first one that is kept."""
    first = next(iter(kept.values()), pixels)
    return resize(pixels, first.shape[1], first.shape[0])
