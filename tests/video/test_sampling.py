"""Which frames are taken, by each rule."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Preprocessing, encode_clip
from vop_jax.video.sampling import SAMPLINGS, sample_indices, stored_indices


@given(st.integers(1, 400), st.integers(1, 64), st.sampled_from(SAMPLINGS), st.integers(0, 9))
def test_indices_are_ascending_frames_of_the_clip(count, frames, sampling, seed):
    for rng in (None, np.random.default_rng(seed)):
        indices = sample_indices(count, frames, sampling, rng)
        assert len(indices) == frames
        assert indices.min() >= 0 and indices.max() < count
        assert (np.diff(indices) >= 0).all()
        if count >= frames:
            assert len(set(indices.tolist())) == frames
        if sampling == "rand" and count >= frames:  # one of each segment
            edges = np.linspace(0, count, frames + 1).astype(int)
            assert ((edges[:-1] <= indices) & (indices < edges[1:])).all()


def test_the_rules():
    assert sample_indices(10, 4, "uniform").tolist() == [0, 3, 5, 8]  # of 0 1, 2 3 4, 5 6, 7 8 9
    assert sample_indices(10, 4, "rand").tolist() == [0, 3, 5, 8]
    assert sample_indices(10, 4, "linspace").tolist() == [0, 3, 6, 9]
    assert sample_indices(10, 4, "segments").tolist() == [1, 3, 6, 8]  # 1.25 3.75 6.25 8.75
    assert sample_indices(7, 3, "segments").tolist() == [1, 3, 5]  # 1.17 3.5 5.83
    assert sample_indices(2, 4, "uniform").tolist() == [0, 1, 1, 1]
    assert sample_indices(2, 4, "segments").tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="at least one frame"):
        sample_indices(0, 4)


@pytest.mark.parametrize("frames", [1, 5, 12, 64])
def test_uniform_indices_are_those_of_the_released_vop(frames):
    """X-Pool's and frozen-in-time's too: middles of ranges that include their ends."""
    for count in range(1, 1501):
        edges = np.linspace(start=0, stop=count, num=min(frames, count) + 1).astype(int)
        ranges = [(first, after - 1) for first, after in itertools.pairwise(edges.tolist())]
        expected = [(first + last) // 2 for first, last in ranges]
        expected += expected[-1:] * (frames - len(expected))
        assert sample_indices(count, frames).tolist() == expected, count


def test_random_indices_reach_every_frame_of_their_segments():
    rng = np.random.default_rng(0)
    indices = {int(i) for _ in range(200) for i in sample_indices(12, 3, "rand", rng)}
    assert indices == set(range(12))
    draws = {tuple(sample_indices(11, 3, "segments", rng)) for _ in range(2000)}
    assert len(draws) == 27 and max(map(max, draws)) == 8  # 3 of each 3, the last 2 never


@pytest.mark.parametrize("fps", [1, 3])
@pytest.mark.parametrize("rate", [24000 / 1001, 25.0, 30000 / 1001, 30.0, 60000 / 1001, 2.0])
def test_linspace_stores_what_clip4clip_reads(rate, fps):
    """It rounds the rate down, and takes the first of the frames at each `interval` a second."""
    count, whole = 307, int(rate)
    interval = max(1, whole // fps)
    offsets = list(range(0, whole, interval))[:fps]
    seconds = range(0, count, whole)
    expected = [i for second in seconds for i in (second + o for o in offsets) if i < count]
    times = np.arange(count) / rate
    for shown in (times, times.round(3), times + 12.5):
        assert stored_indices(shown.tolist(), shown[0], fps, "linspace") == expected


def test_stored_indices_take_no_longer_for_long_gaps():
    assert stored_indices([0.0, 0.1, 1e12, 1e12 + 0.5, 1e12 + 1], 0.0, 1.0) == [0, 2, 4]


def test_records_hold_these_frames(tmp_path):
    path = videos.write(tmp_path / "film.mp4", 20)
    for sampling in ("uniform", "linspace", "segments"):
        clip = VideoClip("film", str(path), ("a film",))
        encoded = encode_clip(clip, Preprocessing(frames=6, sampling=sampling))
        assert list(encoded.indices) == sample_indices(20, 6, sampling).tolist()
