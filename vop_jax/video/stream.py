"""The video stream of an open file: its packets and frames, each with its time.

The reader trusts frames, not statements: what a file says of its length, its index or its colours
is used only where frames bear it out. Worker processes import this file, so it stays light.
"""

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
import av.logging
from av.container import InputContainer

from vop_jax.errors import VideoError
from vop_jax.storage import remote
from vop_jax.storage.files import is_remote
from vop_jax.video.files import stat, stated_bytes

# Formats that hold their frames themselves. Playlists and image sequences name other files and
# addresses: a file from anywhere must not make this process read those.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,vob,asf,flv,live_flv,"
    "f4v,ogg,gif,apng,rm,dv,mxf,nut,ivf,swf,wtv,nsv,gxf,nuv,pva,ty,rpl,roq,smk,bink,cine,flic,amv,"
    "h261,h263,h264,hevc,vvc,m4v,mpjpeg,mjpeg,av1,obu,vc1,vc1test,cavsvideo,dirac,yuv4mpegpipe,"
    "image2,jpeg_pipe,png_pipe,webp_pipe,webp,bmp_pipe,tiff_pipe,jpegxl_pipe,jpegxl_anim,gif_pipe"
)
# Without `pattern_type`, a picture called %02d.png would be a pattern of names.
OPTIONS = {"format_whitelist": FORMATS, "pattern_type": "none"}
COVER = av.stream.Disposition.attached_pic  # the picture of a music file
DEFAULT = av.stream.Disposition.default
SAMPLE = 1000  # packets that show which of several streams is the film
# FFmpeg's flags of formats: their clock may restart (MPEG-TS, MPEG-PS, Ogg); they have no stamps.
TS_DISCONT, NO_TIMESTAMPS = 0x200, 0x80
DEFAULT_RATE = 25  # frames per second, where a file does not state it
REORDERED = 8  # most frames of an AVI that are stored before frames that are shown earlier

# Steps between packets, in seconds, at which the clock was reset, as FFmpeg decides: a still
# picture may last for hours, or for seconds in formats that are spliced; time never runs back.
LEAP, SPLICE, BACK = 30 * 3600.0, 10.0, 1.0

# What PyAV, FFmpeg, NumPy and Python raise over arbitrary files.
FOREIGN = (
    *(av.error.FFmpegError, OSError, ArithmeticError, LookupError, ValueError),
    *(ImportError, MemoryError, RuntimeError),
)
TimedFrames = Iterator[tuple[float, av.VideoFrame]]  # (seconds, frame), in the order of display


class VideoStream:
    """The video stream of an open file, read once from front to back.

    A stamp is a time in ticks of the stream, as the file stores it; all methods take and return
    seconds since the file begins, as players count them.

    Attributes:
        read, damaged: packets from the first key frame on, and those that do not decode.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream):
        self.container, self.stream = container, stream
        stream.codec_context.thread_count = 1  # clips are decoded in parallel instead
        self._tick = tick = stream.time_base or Fraction(1, av.time_base)
        self._numerator, self._denominator = tick.numerator, tick.denominator  # fractions are slow
        self.read = self.damaged = 0
        self._origin = _origin(container, stream, tick)
        self._origin_unknown = stream.start_time is None  # then the first packet has it
        rate = stream.guessed_rate or stream.average_rate or DEFAULT_RATE
        self._interval = max(1, round(1 / (rate * tick)))  # ticks between frames
        leap = SPLICE if container.format.flags & TS_DISCONT else LEAP
        self._leap, self._back = int(leap / tick), int(BACK / tick)
        self._shift = 0  # added to stamps, so that the clock goes on where it was reset
        self._last: int | None = None  # stamp of the last packet
        self._due = 0  # stamp of the next packet, by the duration of the last
        self._next_packet = self._origin  # stamp of a packet that has none
        self._next_frame = self._origin  # stamp of a frame that has none
        # AVI numbers packets in the order of storage; H.264 frames are shown in another order.
        is_avi = container.format.name == "avi"
        self._stored_stamps = collections.deque[int]() if is_avi else None
        self._first_stamps = set[int | None]()  # of an AVI's first packets that decode

    def seconds(self, stamp: int) -> float:
        return (stamp - self._origin) * self._numerator / self._denominator

    def packet_time(self, packet: av.Packet) -> float:
        """When the frame in a packet is shown."""
        use_dts = packet.pts is None or self._stored_stamps is not None
        stamp = packet.dts if use_dts else packet.pts
        if stamp is None:
            stamp = self._next_packet
        self._next_packet = stamp + (packet.duration or self._interval)
        return self.seconds(stamp)

    def packets(self) -> Iterator[av.Packet]:
        """Packets up to where the file ends or breaks off, on one clock."""
        # PyAV raises IndexError at the end of a file in which a stream begins midway.
        with contextlib.suppress(av.error.FFmpegError, IndexError):
            for packet in self.container.demux(self.stream):
                if packet.size:
                    if self._origin_unknown and packet.pts is not None:
                        self._origin = self._next_packet = self._next_frame = packet.pts
                        self._origin_unknown = False
                    self._close_leap(packet)
                    yield packet

    def _close_leap(self, packet: av.Packet) -> None:
        """Shifts the stamps of a packet after the clock was reset."""
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
            packet.pts = None  # a stamp of the new clock, before the packets of that clock
        self._last, self._due = dts, dts + (packet.duration or 0)

    def seek(self, seconds: float) -> None:
        """Goes to a packet before a time, if the format has stamps that occur once."""
        flags = self.container.format.flags
        if not self._origin_unknown and not flags & (TS_DISCONT | NO_TIMESTAMPS):
            # An overflow: a time later than any frame.
            with contextlib.suppress(av.error.FFmpegError, OverflowError):
                self.container.seek(self._origin + int(seconds / self._tick), stream=self.stream)

    def frames_by_seeking(self, start: float) -> TimedFrames:
        """`frames_from`, beginning where the file's index places `start`."""
        self.seek(start)
        return self.frames_from(start)

    def frames_from(self, start: float) -> TimedFrames:
        """Frames from the last key frame at or before `start` on; earlier ones are not decoded."""
        packets, group = self.packets(), list[av.Packet]()
        for packet in packets:
            if packet.is_keyframe and self.packet_time(packet) <= start:
                group = []
            group.append(packet)
            if packet.dts is None or self.seconds(packet.dts) > start:
                break
        frames = self.frames(itertools.chain(group, packets))
        if self._stored_stamps is not None:
            frames = self._shift_avi_frames(frames)
        return itertools.dropwhile(lambda timed: not timed[1].key_frame, frames)

    def _shift_avi_frames(self, frames: TimedFrames) -> TimedFrames:
        """Frames of an AVI that is decoded from a key frame on, at their right times.

        Frames that are stored after the key frame and shown before it need frames before it, so
        they do not decode; all others come as many places too early.
        """
        ahead = list(itertools.islice(frames, 2 * REORDERED))
        lost = len(self._first_stamps - {frame.pts for _, frame in ahead})
        rate = self._denominator / self._numerator
        for time, frame in itertools.chain(ahead, frames):
            stamp = self._origin + round(time * rate) + lost * self._interval
            yield self.seconds(stamp), frame

    def all_frames(self, start: float = 0.0) -> TimedFrames:
        """Frames from the first one that decodes on."""
        return self.frames(self.packets())

    def frames(self, packets: Iterable[av.Packet]) -> TimedFrames:
        """The frames of packets."""
        begun = False  # packets before the first key frame lack their references: no damage
        for packet in itertools.chain(packets, [None]):  # None flushes the decoder
            if packet is not None:
                begun = begun or packet.is_keyframe
                self.read += begun
                if self._stored_stamps is not None and packet.dts is not None:
                    self._stored_stamps.append(packet.dts)
            try:
                decoded = self.stream.decode(packet)
            except av.error.FFmpegError:
                self.damaged += begun
                if self._stored_stamps:
                    self._stored_stamps.pop()
                continue
            if self._stored_stamps is not None and packet is not None and self.read <= REORDERED:
                self._first_stamps.add(packet.pts)
            for frame in decoded:
                self.damaged += begun and frame.is_corrupt
                yield self._frame_time(frame), frame

    def _frame_time(self, frame: av.VideoFrame) -> float:
        if self._stored_stamps is not None:
            stamp = self._stored_stamps.popleft() if self._stored_stamps else None
        else:
            stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is None:
            stamp = self._next_frame
        self._next_frame = stamp + (frame.duration or self._interval)
        return self.seconds(stamp)

    @property
    def end(self) -> float:
        """When the last decoded frame ends."""
        return self.seconds(self._next_frame)

    def has_all_bytes(self, path: str) -> bool:
        """Whether the file is as long as it says; True if it does not say."""
        with _open_binary(path) as file:
            return stated_bytes(file, self.container.format.name) <= stat(path).length

    def stated_seconds(self) -> float:
        """When the video ends by what the file says; 0 if it does not say."""
        if self.container.format.name == "avi" and self.stream.frames:
            return float(self.stream.frames * self._tick)  # an AVI's duration is guessed by size
        if self.stream.duration:
            return float(self.stream.duration * self._tick)
        if tag := self.stream.metadata.get("DURATION"):  # Matroska and webm: 00:00:05.240000000
            with contextlib.suppress(ValueError):  # a damaged tag says nothing
                hours, minutes, seconds = map(float, tag.split(":"))
                return 3600 * hours + 60 * minutes + seconds
        if self.container.duration and len(self.container.streams) == 1:
            return self.container.duration / av.time_base
        return 0.0


@contextlib.contextmanager
def as_video_error() -> Iterator[None]:
    """Around code that reads a file: every exception of it becomes a VideoError."""
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
def open_stream(path: str) -> Iterator[VideoStream]:
    """The main video stream of a file.

    Raises:
        VideoError: the file is missing, empty or no video; also for what the caller's code raises.
    """
    av.logging.set_level(av.logging.PANIC)  # reasons are raised, not printed
    with as_video_error(), contextlib.ExitStack() as stack:
        status = stat(path)
        if status.is_directory:
            raise VideoError("a folder, not a video")
        if not status.length:
            raise VideoError("zero bytes")
        container = stack.enter_context(_open_container(path))
        streams = _main_streams(container)
        number = streams[0].index
        if len(streams) > 1:  # the film is the one with more packets
            packets = itertools.islice(container.demux(*streams), SAMPLE)
            counts = collections.Counter(packet.stream_index for packet in packets)
            number = max((stream.index for stream in streams), key=lambda index: counts[index])
            container = stack.enter_context(_open_container(path))
        yield VideoStream(container, next(s for s in container.streams.video if s.index == number))


def frame_rates(paths: Iterable[str]) -> dict[str, float]:
    """{path: frames per second that the file states}; 25 for one that says nothing or is gone."""
    rates = {}
    for path in paths:
        try:
            with open_stream(path) as video:
                rates[path] = float(video.stream.average_rate or DEFAULT_RATE)
        except VideoError:
            rates[path] = float(DEFAULT_RATE)
    return rates


@contextlib.contextmanager
def _open_container(path: str) -> Iterator[InputContainer]:
    with contextlib.ExitStack() as stack:
        # `file:` because FFmpeg takes what is before a colon for a protocol.
        file: Any = f"file:{path}"
        if is_remote(path):
            file = stack.enter_context(remote.open_file(path))
        yield stack.enter_context(
            av.open(file, container_options=OPTIONS, metadata_errors="replace")
        )


def _open_binary(path: str) -> BinaryIO:
    return remote.open_file(path) if is_remote(path) else open(path, "rb")


def _main_streams(container: InputContainer) -> list[av.VideoStream]:
    """The default video stream, or the one with most frames; several if the file does not say."""
    streams = [s for s in container.streams.video if not s.disposition & COVER]
    if not streams:
        raise VideoError("no video stream")
    decodable = [s for s in streams if s.codec_context is not None]
    if not decodable:
        raise VideoError("unknown codec")
    candidates = [s for s in decodable if s.disposition & DEFAULT] or decodable
    most = max(stream.frames for stream in candidates)
    return [stream for stream in candidates if stream.frames == most]


def _origin(container: InputContainer, stream: av.VideoStream, tick: Fraction) -> int:
    """The stamp of time 0, as FFmpeg sets it.

    It is the beginning of the file, where sound may begin before the picture; in broadcast
    formats, whose clock starts anywhere, the beginning of the video.
    """
    begin = stream.start_time or 0
    if container.start_time is None or container.format.flags & TS_DISCONT:
        return begin
    lead = float(begin * tick) - container.start_time / av.time_base
    # The container's time is rounded; the stream's own is exact.
    return begin - round(lead / tick) if lead > 1e-5 else begin
