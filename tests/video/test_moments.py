"""Moments of a video: the frames that the same stretch gives by itself, all in one pass."""

import math
import tracemalloc

import numpy as np
import pytest

from tests.video import videos
from vop_jax.errors import VideoError
from vop_jax.video import moments
from vop_jax.video.crops import eval_crop
from vop_jax.video.decode import Segment
from vop_jax.video.frames import read_frames
from vop_jax.video.moments import (
    WHOLE,
    Reading,
    Survey,
    Task,
    read_pictures,
    spans_of,
    survey,
    tasks_of,
)
from vop_jax.video.sampling import sample_indices

READING = Reading(frames=4, image_size=16, short_side=32)


def expected(path, span, reading=READING):
    """The frames as training reads them."""
    end = None if math.isinf(span[1]) else span[1]
    clip = read_frames(
        path,
        reading.frames,
        start=span[0],
        end=end,
        short_side=reading.short_side,
        sampling=reading.sampling,
        fps=reading.fps,
    ).pixels
    if reading.fps:
        taken = sample_indices(len(clip), reading.frames, reading.sampling)
        clip = [clip[i] for i in taken]
    return eval_crop(clip, reading.image_size)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """30 s, key frames every 5 s, B-frames."""
    path = tmp_path_factory.mktemp("moments") / "film.mp4"
    options = {"g": "50", "bf": "2"}
    return str(videos.write(path, 300, rate=10, width=48, height=40, options=options))


@pytest.mark.parametrize(
    ("duration", "window", "stride", "spans"),
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
def test_moments_cover_a_video_to_its_end(duration, window, stride, spans):
    seen = Survey("", duration, [], np.arange(0, duration, 0.1))
    assert spans_of(seen, window, stride) == spans


def test_moments_without_a_frame_are_left_out_and_many_take_little_memory():
    shown = np.sort(np.random.default_rng(0).uniform(0, 1e4, 40))
    starts = [0.5 * k for k in range(19_994)] + [1e4 - 3.2]
    every = [(round(start, 3), round(start + 3.2, 3)) for start in starts]
    some = [(a, b) for a, b in every if ((shown >= a) & (shown < b)).any()]
    assert spans_of(Survey("", 1e4, [], shown), 3.2, 0.5) == some

    tracemalloc.start()
    assert len(spans_of(Survey("", 6e4, [], np.arange(0, 6e4, 5.0)), 2000, 5)) == 11_601
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6  # bytes; 39e6 by asking of each frame which moments show it


@pytest.mark.parametrize(
    "reading",
    [
        READING,
        Reading(3, 16, 32, "linspace"),
        Reading(4, 16, 32, "uniform", fps=2.0),
    ],
)
def test_one_pass_gives_the_frames_of_each_stretch(film, reading):
    spans = (WHOLE, *spans_of(survey(film, READING), 4, 3))
    found = read_pictures(Task(film, reading, spans))
    assert len(found.pixels) < reading.frames * len(spans)  # each frame once
    for number, span in enumerate(spans):
        np.testing.assert_array_equal(found.clip(number), expected(film, span, reading))


def test_a_stretch_in_the_middle_is_reached_by_seeking(film):
    spans = ((14.0, 18.0), (16.0, 20.0))
    found = read_pictures(Task(film, READING, spans))
    for number, span in enumerate(spans):
        np.testing.assert_array_equal(found.clip(number), expected(film, span))


def test_a_survey_tells_what_decoding_will_find(film):
    seen = survey(film, READING)
    assert seen.duration == 30.0
    assert seen.times == pytest.approx(read_frames(film, 4).timestamps)
    assert seen.digest == survey(film, READING).digest


def test_a_long_file_is_not_decoded_whole_for_its_clip(film, monkeypatch):
    monkeypatch.setattr(moments, "LONG", 20.0)
    seen = survey(film, READING)
    (task,) = tasks_of(film, seen, [], READING)
    assert task.times == tuple(seen.times)
    decoded = []
    decode = Segment.decode

    def counted(self, keep):
        kept = decode(self, keep)
        decoded.append(len(self.times))
        return kept

    monkeypatch.setattr(Segment, "decode", counted)
    found = read_pictures(task).clip(0)
    assert decoded == [1, 1, 1, 1]
    np.testing.assert_array_equal(found, expected(film, WHOLE))


def test_a_frame_that_seeking_does_not_find_is_found_by_decoding_all(film):
    found = read_pictures(Task(film, READING, times=(1.0, 5.0, 20.0, 99.0)))
    np.testing.assert_array_equal(found.clip(0), expected(film, WHOLE))
    span = (3.0, 21.0)
    found = read_pictures(Task(film, READING, (span,), (5.0, 5.01, 6.0, 7.0)))
    np.testing.assert_array_equal(found.clip(0), expected(film, span))


def test_long_files_are_cut_into_tasks(film, monkeypatch):
    monkeypatch.setattr(moments, "PICTURES", 12)
    seen = survey(film, READING)
    spans = spans_of(seen, 4, 2)
    tasks = tasks_of(film, seen, spans, READING)
    assert tasks[0].times and not tasks[0].spans
    assert [span for task in tasks[1:] for span in task.spans] == spans
    assert {len(task.spans) for task in tasks[1:]} <= {1, 2, 3}
    # Wide windows make tasks long in seconds, too.
    monkeypatch.setattr(moments, "SECONDS", 5.0)
    assert {len(task.spans) for task in tasks_of(film, seen, spans, READING)[1:]} == {1}


def test_moments_between_the_pictures_of_a_slide_show_are_none(tmp_path):
    times = [0, 400, 10_000, 10_400]
    film = videos.write(tmp_path / "slides.mkv", 4, rate=1000, milliseconds=times)
    found = read_pictures(Task(str(film), READING, (WHOLE, (0.0, 4.0), (4.0, 8.0))))
    assert found.clip(1) is not None and found.clip(2) is None


def test_what_is_no_video_says_why(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    with pytest.raises(VideoError, match="not readable as video"):
        survey(text, READING)
    with pytest.raises(VideoError, match="no such file"):
        survey(tmp_path / "none.mp4", READING)
    whole = videos.write(tmp_path / "whole.mp4", 30)
    cut = tmp_path / "cut.mkv"
    videos.write(cut, 100)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    with pytest.raises(VideoError, match="truncated"):
        read_pictures(Task(str(cut), READING, (WHOLE,)))
    assert read_pictures(Task(str(whole), READING, (WHOLE,))).clip(0) is not None
