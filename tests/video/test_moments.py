"""Moments of a video: one pass gives the frames that each segment has by itself."""

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
    read_segment,
)
from vop_jax.video.sampling import sample_indices

SPEC = FrameSpec(frames=4, image_size=16, short_side=32)


def check_clip(clip, path, segment, spec=SPEC):
    """That a clip has the frames that training reads of a segment."""
    start, end = segment
    frames = read_frames(
        path,
        spec.frames,
        start=start,
        end=end,
        short_side=spec.short_side,
        sampling=spec.sampling,
        fps=spec.fps,
    ).pixels
    if spec.fps:
        frames = [frames[i] for i in sample_indices(len(frames), spec.frames, spec.sampling)]
    np.testing.assert_array_equal(clip, eval_crop(frames, spec.image_size))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """30 s, key frames every 5 s, B-frames."""
    path = tmp_path_factory.mktemp("moments") / "film.mp4"
    options = {"g": "50", "bf": "2"}
    return str(videos.write(path, 300, rate=10, width=48, height=40, options=options))


def test_moments_cover_a_video_to_its_end():
    for duration, window, stride, starts in (
        *((25, 10, 5, [0, 5, 10, 15]), (23, 10, 5, [0, 5, 10, 13]), (10.5, 10, 5, [0, 0.5])),
        *((20, 10, 10, [0, 10]), (10, 10, 5, []), (3, 10, 5, []), (30, 0, 0, [])),
    ):
        info = VideoInfo("", duration, [], np.arange(0, duration, 0.1))
        moments = list_moments(info, window, stride)
        assert moments == [(start, start + window) for start in starts]


def test_moments_without_a_frame_are_left_out_and_many_take_little_memory():
    few = np.array([0.0, 3.0, 3.1, 200.25])
    many = np.sort(np.random.default_rng(0).uniform(0, 200, 40))
    for times in (few, many):
        for window, stride in ((2.0, 0.5), (2.0, 1.5), (0.3, 0.3), (180.0, 90.0), (3.2, 0.5)):
            count = math.ceil((201 - window) / stride)
            starts = [*(i * stride for i in range(count)), 201 - window]
            edges = [(round(start, 3), round(start + window, 3)) for start in starts]
            expected = [(a, b) for a, b in edges if ((times >= a) & (times < b)).any()]
            assert list_moments(VideoInfo("", 201.0, [], times), window, stride) == expected
    assert len(list_moments(VideoInfo("", 1e12, [], np.array([0.0, 5e11])), 10.0, 5.0)) == 3

    tracemalloc.start()
    assert len(list_moments(VideoInfo("", 2e4, [], np.arange(0, 2e4, 5.0)), 2000, 5)) == 3601
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # bytes; 26e6 by listing the moments of each frame


@pytest.mark.parametrize(
    "spec", [SPEC, FrameSpec(3, 16, 32, "linspace"), FrameSpec(4, 16, 32, "uniform", fps=2.0)]
)
def test_one_pass_gives_the_frames_of_each_segment(film, spec):
    in_the_middle = ((14.0, 18.0), (16.0, 20.0))  # reached by seeking
    for segments in ((WHOLE_FILE, *list_moments(inspect_video(film, spec), 4, 3)), in_the_middle):
        decoded = decode_task(DecodeTask(film, spec, segments))
        assert len(decoded.pixels) < spec.frames * len(segments)  # each frame once
        for number, segment in enumerate(segments):
            check_clip(decoded.clip(number), film, segment, spec)


def test_a_long_file_is_not_decoded_whole_for_its_clip(film, monkeypatch):
    monkeypatch.setattr(moments, "LONG_FILE", 20.0)
    info = inspect_video(film, SPEC)
    assert info.duration == 30.0
    assert info.clip_times == pytest.approx(read_frames(film, 4).timestamps)
    (task,) = plan_tasks(film, info, [], SPEC)
    assert task.times == tuple(info.clip_times)
    counts = []
    decode = SegmentReader.decode

    def counting(self, indices):
        frames = decode(self, indices)
        counts.append(len(self.times))
        return frames

    with monkeypatch.context() as patch:
        patch.setattr(SegmentReader, "decode", counting)
        clip = decode_task(task).clip(0)
        assert counts == [1, 1, 1, 1]
        pixels, times = read_segment(film, SPEC, 2.0)
        assert counts == [1] * 8
    check_clip(clip, film, WHOLE_FILE)
    check_clip(pixels, film, (2.0, math.inf))
    assert times == read_frames(film, 4, start=2.0).timestamps


def test_where_seeking_finds_no_frame_the_segment_is_decoded(film):
    decoded = decode_task(DecodeTask(film, SPEC, times=(1.0, 5.0, 20.0, 99.0)))
    check_clip(decoded.clip(0), film, WHOLE_FILE)
    segment = (3.0, 21.0)
    decoded = decode_task(DecodeTask(film, SPEC, (segment,), (5.0, 5.01, 6.0, 7.0)))
    check_clip(decoded.clip(0), film, segment)


def test_the_tasks_of_a_long_file_are_bounded(film, monkeypatch):
    monkeypatch.setattr(moments, "MAX_PICTURES", 12)
    info = inspect_video(film, SPEC)
    segments = list_moments(info, 4, 2)
    clip, *others = plan_tasks(film, info, segments, SPEC)
    assert clip.times and not clip.segments
    assert [segment for task in others for segment in task.segments] == segments
    assert {len(task.segments) for task in others} <= {1, 2, 3}
    monkeypatch.setattr(moments, "MAX_SECONDS", 5.0)
    assert {len(task.segments) for task in plan_tasks(film, info, segments, SPEC)[1:]} == {1}


def test_moments_between_the_pictures_of_a_slide_show_have_no_clip(tmp_path):
    times = [0, 400, 10_000, 10_400]
    film = videos.write(tmp_path / "slides.mkv", 4, rate=1000, milliseconds=times)
    decoded = decode_task(DecodeTask(str(film), SPEC, (WHOLE_FILE, (0.0, 4.0), (4.0, 8.0))))
    assert decoded.clip(1) is not None and decoded.clip(2) is None
    with pytest.raises(VideoError, match="no frame between 4 and 8 s"):
        read_segment(film, SPEC, 4.0, 8.0)
