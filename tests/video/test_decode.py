"""The reader of videos against written frames, and against decoding whole files in order."""

import io
import itertools
import math
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest

from tests.video import videos
from vop_jax.errors import VideoError
from vop_jax.video.decode import SegmentReader
from vop_jax.video.files import stated_bytes
from vop_jax.video.frames import read_frame_at, read_frames
from vop_jax.video.moments import (
    WHOLE_FILE,
    DecodeTask,
    FrameSpec,
    decode_task,
    inspect_video,
    list_moments,
)

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
PRESET = {"preset": "veryfast", "sc_threshold": "0"}
X264 = {"codec": "libx264", "options": {**PRESET, "g": "35", "bf": "2"}}
MPEG = {"codec": "mpeg2video", "options": {"g": "60", "bf": "2", "qmin": "1", "qmax": "3"}}
OPEN = {**PRESET, "g": "7", "bf": "4", "b-pyramid": "normal", "x264-params": "open-gop=1"}
# How a file of each kind is written. Key frames are 35 frames apart in most of them; `rate`: it
# has no other times.
CONTAINERS = {
    "a.mp4": X264,
    "open.mkv": {**X264, "options": OPEN},
    "fragments.mp4": {**X264, "container": FRAGMENTS},
    "a.mkv": X264,
    "hevc.mkv": {
        "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=35"},
    },
    "a.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "a.avi": {"codec": "mpeg4", "options": {"g": "35"}, "base": 25},
    "open.avi": {"codec": "mpeg4", "options": {"g": "35", "bf": "2"}, "rate": 5},
    "h264.avi": {
        **X264,
        "rate": 5,
        "options": {**X264["options"], "x264-params": "open-gop=1:b-adapt=0"},
    },
    "a.flv": X264,
    "a.ts": {**X264, "base": 90000},
    "mpeg2.ts": {**MPEG, "rate": 25},
    "a.mpg": {**MPEG, "rate": 25},
    "a.asf": {"codec": "wmv2", "options": {"g": "35"}},
    "a.nut": X264,
    "a.gif": {"codec": "gif", "pixel_format": "rgb8", "base": 100},
    "a.avif": {
        "codec": "libsvtav1",
        "options": {"preset": "12", "g": "35", "svtav1-params": "lp=1"},
    },
    "a.h264": {**X264, "rate": 5},
}
TIMES = {  # milliseconds
    "constant": [200 * i for i in range(70)],
    "variable": [*itertools.accumulate([40, 40, 200, 520, 40, 1000, 80] * 8, initial=0)],
    # A recording of a screen: one frame while nothing moves.
    "screen": [0, *range(6000, 10000, 40), *range(12000, 14000, 40)],
}


def make(folder: Path, name: str, milliseconds: list[int], **settings) -> tuple[Path, np.ndarray]:
    """(file, seconds of its frames)."""
    settings = {**CONTAINERS.get(name, X264), **settings}
    base = settings.setdefault("base", settings.get("rate", 1000))
    if "rate" in settings:  # of other times the format knows nothing
        milliseconds = [1000 * i // base for i in range(len(milliseconds))]
    settings.setdefault("rate", 5)
    times = [round(time * base / 1000) for time in milliseconds]
    return videos.write_numbered(folder / name, times, **settings), np.array(times) / base


def in_order(path: Path) -> dict[int, np.ndarray]:
    """Pixels of a whole file by number, decoded without seeking or stopping."""
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda stream: stream.frames)
        stream.codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return {videos.number_of(pixels): pixels for pixels in frames}


def check(path: Path, times: np.ndarray, decoded: dict, start: float, end: float) -> None:
    """That a segment has the frames whose times are in it."""
    expected = np.flatnonzero((start <= times) & (times < end)).tolist()
    if not expected:
        with pytest.raises(VideoError, match="no frame decodes between"):
            read_frames(path, 3, start=start, end=end)
        return
    clip = read_frames(path, len(expected), start=start, end=end)
    assert clip.count == len(expected)
    assert [videos.number_of(pixels) for pixels in clip.pixels] == expected
    np.testing.assert_allclose(clip.timestamps, times[expected], atol=2e-3)
    for number, pixels in zip(expected, clip.pixels, strict=True):
        np.testing.assert_array_equal(pixels, decoded[number])


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        (name, rate)
        for name, rate in itertools.product(CONTAINERS, TIMES)
        if (rate == "constant") == ("rate" in CONTAINERS[name])
    ],
)
def test_a_frame_belongs_to_a_segment_by_its_time(tmp_path, monkeypatch, name, rate):
    path, times = make(tmp_path, name, TIMES[rate])
    decoded = in_order(path)
    assert sorted(decoded) == list(range(len(times)))
    last = times[-1]
    # From the start; in the middle; beyond a seek; with the last frame; all; none.
    for start, end in (
        *((0.0, 1.003), (0.397, 2.003), (last / 2 - 0.003, last / 2 + 0.997)),
        *((12.0, 12.397), (11.003, math.inf), (last, last + 1), (0.0, math.inf)),
        *((last + 0.1, last + 5), (last + 100, math.inf)),
    ):
        check(path, times, decoded, start, end)
        if start < last:  # packets tell how many there are, so that decoding once is enough
            shown = int(((start <= times) & (times < end)).sum())
            assert len(SegmentReader(path, start, end).packet_times()) == shown
    for seconds in (0.0, last / 2 + 0.003, 12.003, last + 0.003, last + 50):
        number = int(np.searchsorted(times, seconds, "right")) - 1
        np.testing.assert_array_equal(read_frame_at(path, seconds), decoded[number])
    monkeypatch.setattr("vop_jax.video.decode.SEEK_FROM", 0.0)
    check(path, times, decoded, last / 5, last / 2)


def numbers(path, **options) -> list[int]:
    """Of all frames of a segment."""
    count = read_frames(path, 1, **options).count
    return [videos.number_of(pixels) for pixels in read_frames(path, count, **options).pixels]


def spliced(folder: Path) -> Path:
    """MPEG-TS of 2 s, then 2 s of another clock, during which a stream of sound begins."""
    first = videos.write_numbered(folder / "1.ts", [4500 * i for i in range(40)], base=90000)
    grey = np.full((32, 64, 3), 90, np.uint8)
    with av.open(str(folder / "2.ts"), "w") as file:
        picture, sound = file.add_stream("libx264", rate=20), file.add_stream("aac", rate=16000)
        picture.width, picture.height = 64, 32
        for i in range(40):
            file.mux(picture.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            file.mux(sound.encode(videos.silence(i)))
        for stream in (picture, sound):
            file.mux(stream.encode(None))
    path = folder / "spliced.ts"
    path.write_bytes(first.read_bytes() + (folder / "2.ts").read_bytes())
    return path


def test_clocks_that_restart_while_recording(tmp_path):
    """Time goes on where stamps leap, and no list is as long as a leap."""
    for name, codec in (("a.mkv", "mpeg4"), ("h264.mkv", "libx264"), ("a.flv", "libx264")):
        plain = videos.write_numbered(tmp_path / name, [100 * i for i in range(40)], codec=codec)
        path = tmp_path / f"leap_{name}"
        with av.open(str(plain)) as source, av.open(str(path), "w") as file:
            stream = file.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    leap = 1_700_000_000_000 if packet.dts is not None and packet.dts >= 2000 else 0
                    packet.pts, packet.dts = packet.pts + leap, (packet.dts or 0) + leap
                    packet.stream = stream
                    file.mux(packet)
        assert numbers(path) == list(range(40))
        assert len(read_frames(path, 1, fps=1).indices) in (4, 5)  # B-frames blur where it leaps
        assert numbers(path, start=1.0, end=1.8) == list(range(10, 18))
        info = inspect_video(path, FrameSpec(4, 16))
        assert info.duration == pytest.approx(4.0, abs=0.6) and not list_moments(info, 10, 5)
    day = 24 * 3_600_000
    # A picture may stay for a day; its moments are those in which one appears.
    path = videos.write_numbered(tmp_path / "day.mkv", [0, 100, day, day + 100], codec="mpeg4")
    info = inspect_video(path, FrameSpec(4, 16))
    moments = list_moments(info, 10, 5)
    assert moments[0] == (0.0, 10.0) and moments[-1][1] == info.duration and len(moments) < 6
    assert read_frames(path, 1, fps=1).count == 4
    decoded = decode_task(DecodeTask(str(path), FrameSpec(2, 16), (WHOLE_FILE, *moments)))
    assert None not in decoded.rows
    path = spliced(tmp_path)
    clip = read_frames(path, 80)
    assert clip.count == 80 and clip.timestamps == sorted(clip.timestamps)
    assert numbers(path, start=1.0, end=1.8) == list(range(20, 36))


def test_every_orientation(tmp_path):
    path = videos.write_numbered(tmp_path / "a.mp4", [0, 100], size=(64, 32))
    stored = in_order(path)[1]
    for first, second, transposed in itertools.product((1, -1), (1, -1), (False, True)):
        a, b, c, d = matrix = (0, first, second, 0) if transposed else (first, 0, 0, second)
        expected = np.zeros((64, 32, 3) if b else (32, 64, 3), np.uint8)
        for y, x in np.ndindex(32, 64):  # as ISO 14496-12 says where a pixel goes
            right, down = a * x + c * y, b * x + d * y
            expected[down - (down < 0 or b + d < 0), right - (a + c < 0)] = stored[y, x]
        pixels = read_frames(videos.rotate(path, matrix), 2).pixels[1]
        np.testing.assert_array_equal(pixels, expected)


def test_impossible_colour_tags_are_ignored(tmp_path):
    plain = videos.write_numbered(tmp_path / "plain.mp4", [0, 100])
    path = videos.write_numbered(tmp_path / "a.mp4", [0, 100], tags={"colorspace": 8})  # YCgCo
    np.testing.assert_array_equal(read_frames(path, 2).pixels, read_frames(plain, 2).pixels)


def test_frames_of_changing_size_are_resized_to_the_first(tmp_path):
    parts = [
        videos.write_numbered(tmp_path / f"{i}.h264", [0, 1, 2], base=10, size=size).read_bytes()
        for i, size in enumerate(((64, 32), (96, 96)))
    ]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(parts))
    assert {pixels.shape for pixels in read_frames(path, 6).pixels} == {(32, 64, 3)}
    assert numbers(path) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "of_still", "of_film", "frames"),
    [
        ("a.mov", "", "default", 5),
        ("a.mov", "default", "", 1),
        ("a.mp4", "attached_pic", "default", 5),
        ("a.mkv", "", "default", 5),
        ("a.mkv", "", "", 5),
        ("a.nut", "", "", 5),
    ],
)
def test_the_main_stream(tmp_path, name, of_still, of_film, frames):
    """Of a still and a film of five frames, by what the file says of them, else by their length."""
    grey = np.full((32, 64, 3), 99, np.uint8)
    marks = av.stream.Disposition
    with av.open(str(tmp_path / name), "w") as file:
        still, film = file.add_stream("mjpeg", rate=10), file.add_stream("libx264", rate=10)
        still.pix_fmt = "yuvj420p"
        for stream, mark in ((still, of_still), (film, of_film)):
            stream.width, stream.height = 64, 32
            stream.disposition = marks[mark] if mark else marks(0)
        for stream in (still, *[film] * 5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        for stream in (still, film):
            file.mux(stream.encode(None))
    assert read_frames(tmp_path / name, 5).count == frames


def test_a_file_that_begins_between_key_frames_begins_at_the_next(tmp_path):
    path, _ = make(tmp_path, "a.ts", TIMES["constant"])
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 4 // 188 * 188 :])
    assert numbers(path) == list(range(35, 70))


def test_stated_lengths_are_not_trusted(tmp_path):
    late = videos.write_numbered(tmp_path / "late.mp4", [1000 + 100 * i for i in range(20)])
    assert numbers(late) == list(range(20))
    slides = videos.write_numbered(
        tmp_path / "slides.mkv", [0, 5000, 10000, 15000], options={"bf": "2"}
    )
    assert numbers(slides) == [0, 1, 2, 3]
    # Matroska has one duration for all frames, here 10 s.
    times, slow = [0, 33, 67, 100, 133, 167, 90000, 90033], Fraction(1, 10)
    idle = videos.write_numbered(tmp_path / "idle.mkv", times, options={"bf": "2"}, rate=slow)
    timestamps = read_frames(idle, len(times)).timestamps
    np.testing.assert_allclose(timestamps, np.array(times) / 1000, atol=2e-3)
    one = videos.write_numbered(tmp_path / "one.ts", [0], base=90000)  # too short to state it
    assert read_frames(one, 1, end=0.5).timestamps == [0.0]
    wrong = videos.write_numbered(tmp_path / "wrong.mkv", [100 * i for i in range(20)])
    data = bytearray(wrong.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # the segment's duration, in milliseconds
    data[at : at + 8] = np.array([1e9], ">f8").tobytes()
    at = data.index(b"00:00:0", data.index(b"DURATION"))
    data[at : at + 2] = b"99"
    wrong.write_bytes(bytes(data))
    assert numbers(wrong) == list(range(20))


@pytest.mark.parametrize("name", ["a.mp4", "fragments.mp4", "a.avi", "a.webm", "a.mkv"])
def test_missing_bytes_are_reported_and_extra_ones_ignored(tmp_path, name):
    front = {"container": {"movflags": "faststart"}} if name == "a.mp4" else {}
    path, _ = make(tmp_path, name, TIMES["constant"], size=(256, 128), **front)
    data = path.read_bytes()
    path.write_bytes(data + b"\0\0\0\1junk" + b"\xff" * 8)  # as a box of an MP4: of 2^64 - 1 bytes
    assert len(read_frames(path, 3).indices) == 3
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"^truncated: \d+\.\d s of \d+\.\d s decode$"):
        read_frames(path, 3)
    for size in (b"", b"\0" + b"\xff" * 8):  # sizes that cannot be state nothing
        assert stated_bytes(io.BytesIO(b"\x1a\x45\xdf\xa3" + size), "matroska,webm") == 0


def test_files_that_name_others_are_refused(tmp_path):
    videos.write_numbered(tmp_path / "plain.mp4", [0, 100])
    videos.write_numbered(tmp_path / "01.png", [0], codec="png", pixel_format="rgb24")
    for name, text in (
        ("a.mp4", "ffconcat version 1.0\nfile 'plain.mp4'\n"),
        ("a.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nplain.ts\n#EXT-X-ENDLIST\n"),
        ("a.sdp", "v=0\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
        ("%02d.png", "x"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(VideoError, match=r"not readable as video|no frame decodes"):
            read_frames(tmp_path / name, 2)


def test_invalid_names_and_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    videos.write_numbered(tmp_path / "a.mp4", [0, 100]).rename("12:30.mp4")
    assert read_frames("12:30.mp4", 2).count == read_frame_at("12:30.mp4", 1.0).ndim - 1 == 2
    for path, start, end, reason in (
        ("rtsp://host/x", None, None, r"^an address .rtsp://., not a file"),
        ("nul\0.mp4", None, None, "not the name of a file"),
        ("x" * 5000, None, None, "cannot be opened"),
        ("12:30.mp4", math.nan, None, "a segment from nan to inf s"),
        ("12:30.mp4", 1e17, None, r"between 1e\+17 and the end"),
        ("12:30.mp4", 0.1, 0.1, "between 0.1 and 0.1 s"),
        ("12:30.mp4", 0.2, 0.1, "between 0.2 and 0.1 s"),
    ):
        with pytest.raises(VideoError, match=reason) as caught:
            read_frames(path, 2, start=start, end=end)
        assert len(str(caught.value).splitlines()) == 1
    assert read_frames("12:30.mp4", 2, start=-5, end=0.05).count == 1
    with pytest.raises(VideoError, match="no such file"):
        SegmentReader("none.mp4").packet_times()


def test_every_exception_is_a_video_error(tmp_path, monkeypatch):
    path = videos.write_numbered(tmp_path / "a.mp4", [0, 100])
    for error, reason in (
        *((IndexError("a"), "a"), (KeyError("b"), "'b'"), (ImportError("c\nd"), "c d")),
        *((MemoryError(), "out of memory"), (OSError(5, "e", "f"), "e"), (ValueError("g"), "g")),
    ):
        monkeypatch.setattr(av, "open", Mock(side_effect=error))
        with pytest.raises(VideoError, match=f"^not readable as video .{reason}.$"):
            read_frames(path, 2)
