"""Moments of a video: the frames that the same stretch gives by itself, all in one pass."""

import math
import tracemalloc

import numpy as np
import pytest

from tests.video import videos
from vop_jax.errors import VideoError
from vop_jax.video import moments
from vop_jax.video.crops import eval_crop
from vop_jax.video.decode import SegmentReader
from vop_jax.video.frames import read_frames
from vop_jax.video.moments import (
    WHOLE_FILE,
    DecodeTask,
    FrameSpec,
    VideoInfo,
    decode_task,
    inspect_video,
    list_moments,
    plan_tasks,
)
from vop_jax.video.sampling import sample_indices

SPEC = FrameSpec(frames=4, image_size=16, short_side=32)


def expected(path, segment, spec=SPEC):
    """The frames as training reads them."""
    end = None if math.isinf(segment[1]) else segment[1]
    clip = read_frames(
        path,
        spec.frames,
        start=segment[0],
        end=end,
        short_side=spec.short_side,
        sampling=spec.sampling,
        fps=spec.fps,
    ).pixels
    if spec.fps:
        taken = sample_indices(len(clip), spec.frames, spec.sampling)
        clip = [clip[i] for i in taken]
    return eval_crop(clip, spec.image_size)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """30 s, key frames every 5 s, B-frames."""
    path = tmp_path_factory.mktemp("moments") / "film.mp4"
    options = {"g": "50", "bf": "2"}
    return str(videos.write(path, 300, rate=10, width=48, height=40, options=options))


@pytest.mark.parametrize(
    ("duration", "window", "stride", "segments"),
    [
        (25, 10, 5, [(0, 10), (5, 15), (10, 20), (15, 25)]),
        (23, 10, 5, [(0, 10), (5, 15), (10, 20), (13, 23)]),
        (10.5, 10, 5, [(0, 10), (0.5, 10.5)]),
        (20, 10, 10, [(0, 10), (10, 20)]),
        (10, 10, 5, []),
        (3, 10, 5, []),
        (30, 0, 0, []),
    ],
)
def test_moments_cover_a_video_to_its_end(duration, window, stride, segments):
    info = VideoInfo("", duration, [], np.arange(0, duration, 0.1))
    assert list_moments(info, window, stride) == segments


def test_moments_without_a_frame_are_left_out_and_many_take_little_memory():
    shown = np.sort(np.random.default_rng(0).uniform(0, 1e4, 40))
    starts = [0.5 * k for k in range(19_994)] + [1e4 - 3.2]
    every = [(round(start, 3), round(start + 3.2, 3)) for start in starts]
    some = [(a, b) for a, b in every if ((shown >= a) & (shown < b)).any()]
    assert list_moments(VideoInfo("", 1e4, [], shown), 3.2, 0.5) == some

    tracemalloc.start()
    assert len(list_moments(VideoInfo("", 6e4, [], np.arange(0, 6e4, 5.0)), 2000, 5)) == 11_601
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6  # bytes; 39e6 by asking of each frame which moments show it


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        FrameSpec(3, 16, 32, "linspace"),
        FrameSpec(4, 16, 32, "uniform", fps=2.0),
    ],
)
def test_one_pass_gives_the_frames_of_each_stretch(film, spec):
    segments = (WHOLE_FILE, *list_moments(inspect_video(film, SPEC), 4, 3))
    found = decode_task(DecodeTask(film, spec, segments))
    assert len(found.pixels) < spec.frames * len(segments)  # each frame once
    for number, segment in enumerate(segments):
        np.testing.assert_array_equal(found.clip(number), expected(film, segment, spec))


def test_a_stretch_in_the_middle_is_reached_by_seeking(film):
    segments = ((14.0, 18.0), (16.0, 20.0))
    found = decode_task(DecodeTask(film, SPEC, segments))
    for number, segment in enumerate(segments):
        np.testing.assert_array_equal(found.clip(number), expected(film, segment))


def test_a_survey_tells_what_decoding_will_find(film):
    info = inspect_video(film, SPEC)
    assert info.duration == 30.0
    assert info.clip_times == pytest.approx(read_frames(film, 4).timestamps)
    assert info.digest == inspect_video(film, SPEC).digest


def test_a_long_file_is_not_decoded_whole_for_its_clip(film, monkeypatch):
    monkeypatch.setattr(moments, "LONG_FILE", 20.0)
    info = inspect_video(film, SPEC)
    (task,) = plan_tasks(film, info, [], SPEC)
    assert task.times == tuple(info.clip_times)
    decoded = []
    decode = SegmentReader.decode

    def counted(self, keep):
        kept = decode(self, keep)
        decoded.append(len(self.times))
        return kept

    monkeypatch.setattr(SegmentReader, "decode", counted)
    found = decode_task(task).clip(0)
    assert decoded == [1, 1, 1, 1]
    np.testing.assert_array_equal(found, expected(film, WHOLE_FILE))


def test_a_frame_that_seeking_does_not_find_is_found_by_decoding_all(film):
    found = decode_task(DecodeTask(film, SPEC, times=(1.0, 5.0, 20.0, 99.0)))
    np.testing.assert_array_equal(found.clip(0), expected(film, WHOLE_FILE))
    segment = (3.0, 21.0)
    found = decode_task(DecodeTask(film, SPEC, (segment,), (5.0, 5.01, 6.0, 7.0)))
    np.testing.assert_array_equal(found.clip(0), expected(film, segment))


def test_long_files_are_cut_into_tasks(film, monkeypatch):
    monkeypatch.setattr(moments, "MAX_PICTURES", 12)
    info = inspect_video(film, SPEC)
    segments = list_moments(info, 4, 2)
    tasks = plan_tasks(film, info, segments, SPEC)
    assert tasks[0].times and not tasks[0].segments
    assert [segment for task in tasks[1:] for segment in task.segments] == segments
    assert {len(task.segments) for task in tasks[1:]} <= {1, 2, 3}
    # Wide windows make tasks long in seconds, too.
    monkeypatch.setattr(moments, "MAX_SECONDS", 5.0)
    assert {len(task.segments) for task in plan_tasks(film, info, segments, SPEC)[1:]} == {1}


def test_moments_between_the_pictures_of_a_slide_show_are_none(tmp_path):
    times = [0, 400, 10_000, 10_400]
    film = videos.write(tmp_path / "slides.mkv", 4, rate=1000, milliseconds=times)
    found = decode_task(DecodeTask(str(film), SPEC, (WHOLE_FILE, (0.0, 4.0), (4.0, 8.0))))
    assert found.clip(1) is not None and found.clip(2) is None


def test_what_is_no_video_says_why(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    with pytest.raises(VideoError, match="not readable as video"):
        inspect_video(text, SPEC)
    with pytest.raises(VideoError, match="no such file"):
        inspect_video(tmp_path / "none.mp4", SPEC)
    whole = videos.write(tmp_path / "whole.mp4", 30)
    cut = tmp_path / "cut.mkv"
    videos.write(cut, 100)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    with pytest.raises(VideoError, match="truncated"):
        decode_task(DecodeTask(str(cut), SPEC, (WHOLE_FILE,)))
    assert decode_task(DecodeTask(str(whole), SPEC, (WHOLE_FILE,))).clip(0) is not None
