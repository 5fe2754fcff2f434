"""Shots of a video: found while it is decoded, with the frames that each has by itself."""

import itertools
import pathlib

import numpy as np
import pytest

from tests.video import videos
from tests.video.test_moments import SPEC, check_clip
from vop_jax.errors import VideoError
from vop_jax.video import shots
from vop_jax.video.moments import decode_task, inspect_video, read_segment
from vop_jax.video.shots import ShotTask, decode_shots, plan_shots

LENGTHS = (2.5, 0.4, 3.1, 24.0, 2.0)  # seconds of each grey level
SHOTS = [(0, 2.5), (2.5, 6.0), (6.0, 26.0), (26.0, 30.0), (30.0, 32.0)]  # none short, none long


class LevelDetector:
    """Reports a jump of the grey level two frames later; stands in for PySceneDetect."""

    def __init__(self):
        self.levels = []

    def add(self, index, time, frame):
        self.levels.append(frame.to_ndarray(format="gray").mean())
        recent = self.levels[-4:-2]
        return index - 2 if len(recent) == 2 and abs(recent[0] - recent[1]) > 30 else None


def write_shots(path, lengths=LENGTHS, rate=10):
    """Static shots of two grey levels in turn, with a dot that moves."""
    count = round(rate * sum(lengths))
    cuts = np.round(rate * np.cumsum(lengths))
    levels = np.array([40, 190])[np.searchsorted(cuts, np.arange(count), "right") % 2]
    pictures = np.broadcast_to(levels[:, None, None, None], (count, 40, 48, 3)).astype(np.uint8)
    for number, picture in enumerate(pictures):
        picture[:8, number % 48] = 255
    return str(videos.encode(path, pictures, rate=rate, options={"g": "50", "bf": "2"}))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_shots(tmp_path_factory.mktemp("shots") / "film.mp4")


@pytest.fixture(params=["stand-in", "PySceneDetect"])
def detector(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setattr(shots, "CutDetector", LevelDetector)
    else:
        pytest.importorskip("scenedetect", reason="needs the extra shots")


def decode(path):
    """(segment, its frames) of all tasks: the whole clip, then the shots."""
    info = inspect_video(path, SPEC)
    segments, clips = [(0.0, info.duration)], []
    for task in plan_shots(path, info, SPEC):
        decoded = decode_shots(task) if isinstance(task, ShotTask) else decode_task(task)
        segments += decoded.shots
        clips += [decoded.clip(number) for number in range(len(decoded.rows))]
    return list(zip(segments, clips, strict=True))


def test_shots_have_the_frames_of_their_segments(film, detector):
    decoded = decode(film)
    assert [segment for segment, _ in decoded] == [(0.0, 32.0), *SHOTS]
    for segment, clip in decoded:
        check_clip(clip, film, segment)


def test_a_long_file_is_divided_into_parts(film, detector, monkeypatch):
    monkeypatch.setattr(shots, "PART", 17.0)
    decoded = decode(film)
    assert [segment for segment, _ in decoded] == [
        *((0, 32.0), (0, 2.5), (2.5, 6.0), (6.0, 16.0)),
        *((16.0, 30.0), (30.0, 32.0)),
    ]
    for segment, clip in decoded:
        check_clip(clip, film, segment)


def test_few_frames_wait_however_large_they_are(film, monkeypatch):
    monkeypatch.setattr(shots, "CutDetector", LevelDetector)
    monkeypatch.setattr(shots, "WAITING", 0)
    info = inspect_video(film, SPEC)
    (task,) = plan_shots(film, info, SPEC)
    decoded = decode_shots(task)
    for segment, row in zip(decoded.shots, decoded.rows[1:], strict=True):
        times = [decoded.times[i] for i in row]
        exact = read_segment(film, SPEC, *segment)[1]
        assert segment[0] <= times[0] and times[-1] < segment[1]
        away = np.abs(np.array(times) - exact)
        assert away.max() <= (segment[1] - segment[0]) / SPEC.frames


def test_one_shot_is_no_moment(tmp_path, detector):
    film = write_shots(tmp_path / "one.mp4", (3.0, 0.5))
    assert [segment for segment, _ in decode(film)] == [(0, 3.5)]


def test_a_slide_show_is_divided_at_its_frames(tmp_path, detector):
    path = tmp_path / "slides.mp4"
    times = [0, 1000, 1400, 50_000, 50_100, 51_000, 90_000]
    videos.write_numbered(path, times)
    segments = [segment for segment, _ in decode(str(path))][1:]
    assert segments[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(segments))
    assert all(any(a <= t / 1000 < b for t in times) for a, b in segments)


def test_what_is_no_video_has_no_shots(film, tmp_path, detector):
    cut, text = tmp_path / "cut.mp4", tmp_path / "text.mp4"
    videos.write(cut, 300, options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    text.write_bytes(pathlib.Path(film).read_bytes()[:100])
    for path, reason in ((cut, "truncated"), (text, "not readable as video")):
        with pytest.raises(VideoError, match=reason):
            decode_shots(ShotTask(str(path), SPEC, (0.0, 30.0), clip=True))
