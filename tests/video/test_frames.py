"""Sampling against its definition, decoding against files whose frames are known."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.video import videos
from vop_jax.errors import VideoError
from vop_jax.video.decode import SegmentReader
from vop_jax.video.frames import read_frames
from vop_jax.video.sampling import sample_indices

COUNT = 24
F = 6


def shown(frames) -> list[int]:
    """Which of the written frames these are, by their grey levels."""
    known = videos.levels(COUNT)
    return [int(np.abs(known - videos.level_of(p)).argmin()) for p in frames.pixels]


@pytest.mark.parametrize("frames", [1, 5, 12, 64])
def test_uniform_indices_are_those_of_the_released_vop(frames):
    """Which are X-Pool's and frozen-in-time's too: middles of ranges that include their ends."""
    for count in range(1, 1501):
        edges = np.linspace(start=0, stop=count, num=min(frames, count) + 1).astype(int)
        ranges = [(first, after - 1) for first, after in itertools.pairwise(edges.tolist())]
        expected = [(first + last) // 2 for first, last in ranges]
        expected += expected[-1:] * (frames - len(expected))
        assert sample_indices(count, frames).tolist() == expected, count


@given(count=st.integers(1, 300), frames=st.integers(1, 40), seed=st.integers(0, 100))
def test_random_indices_stay_in_their_segments(count, frames, seed):
    indices = sample_indices(count, frames, "rand", np.random.default_rng(seed))
    if count < frames:
        assert indices.tolist() == sample_indices(count, frames).tolist()
        return
    edges = np.linspace(0, count, frames + 1).astype(int)
    assert ((edges[:-1] <= indices) & (indices < edges[1:])).all()


def test_random_indices_reach_every_frame():
    rng = np.random.default_rng(0)
    drawn = {int(i) for _ in range(200) for i in sample_indices(12, 3, "rand", rng)}
    assert drawn == set(range(12))


def test_short_clip_repeats_its_last_frame(tmp_path):
    frames = read_frames(videos.write(tmp_path / "a.mp4", 4), F)
    assert frames.indices == [0, 1, 2, 3, 3, 3]
    np.testing.assert_array_equal(frames.pixels[3], frames.pixels[5])


def test_one_frame(tmp_path):
    assert read_frames(videos.write(tmp_path / "a.mp4", 1), F).indices == [0] * F


def test_stored_fps(tmp_path):
    path = videos.write(tmp_path / "a.mp4", COUNT)  # 2.4 s
    frames = read_frames(path, F, fps=2)
    assert shown(frames) == frames.indices == [0, 5, 10, 15, 20]
    # More than there are: each frame once.
    assert read_frames(path, F, fps=100).indices == list(range(COUNT))


def test_stored_fps_where_frames_are_numbered_as_stored(tmp_path):
    """H.264 in AVI: the decoder gives frames the times of others."""
    path = videos.write(tmp_path / "a.avi", COUNT)
    whole, frames = read_frames(path, COUNT), read_frames(path, F, fps=3)
    assert whole.timestamps == sorted(whole.timestamps) == pytest.approx(np.arange(24) / 10)
    assert shown(frames) == frames.indices == [0, 4, 7, 10, 14, 17, 20]
    assert frames.timestamps == pytest.approx([0.0, 0.4, 0.7, 1.0, 1.4, 1.7, 2.0])


def test_short_side_shrinks_and_never_enlarges(tmp_path):
    path = videos.write(tmp_path / "a.mp4", 2)
    assert read_frames(path, 1, short_side=24).pixels[0].shape == (24, 32, 3)
    assert read_frames(path, 1, short_side=99).pixels[0].shape == (48, 64, 3)


def zero_bytes(path):
    path.write_bytes(b"")


def half(path):
    videos.write(path, 200, width=320, height=240, options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def no_header(path):
    videos.write(path, COUNT)  # its index is at the end
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def text(path):
    path.write_text("<html>not found</html>")


def holes(path):
    """An mp4 whose pictures, from the second on, are overwritten."""
    videos.write(path, 100, options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    start += (len(data) - start) // 4
    data[start:] = bytes(len(data) - start)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (zero_bytes, "zero bytes"),
        (half, "truncated|damaged"),
        (no_header, "not readable as video"),
        (text, "not readable as video"),
        (holes, "truncated|damaged"),
        (videos.write_audio, "no video stream"),
        (videos.write_music, "no video stream"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: None, "no such file"),
        (lambda path: path.symlink_to("gone.mp4"), "a link to what is not there"),
    ],
)
def test_unusable_files_have_a_reason(tmp_path, damage, reason):
    path = tmp_path / "a.mp4"
    damage(path)
    with pytest.raises(VideoError, match=reason):
        read_frames(path, F)


@pytest.mark.parametrize("asked", ["a", "a.mp4"])
def test_a_file_of_another_name_is_pointed_at(tmp_path, asked):
    videos.write(tmp_path / "a.webm", 5, codec="libvpx-vp9", width=32, height=32)
    with pytest.raises(VideoError, match=r"^no such file, but there is a\.webm$"):
        read_frames(tmp_path / asked, F)


def test_a_segment_that_a_truncated_file_lacks(tmp_path):
    """What is asked for is more than the tenth of the whole that may be missing."""
    path = tmp_path / "a.mp4"
    videos.write(path, 400, width=320, height=240, options={"movflags": "faststart"})  # 40 s
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    end = SegmentReader(path).packet_times()[-1]
    with pytest.raises(VideoError, match="truncated"):
        read_frames(path, F, start=end - 2, end=end + 3)
    assert read_frames(path, F, start=end - 5, end=end).count


def test_pictures_of_sixteen_bits_are_scaled(tmp_path):
    levels = np.arange(0, 65536, 257, np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "1.png")
    (pixels,) = read_frames(tmp_path, 1).pixels
    np.testing.assert_array_equal(pixels, np.repeat((levels // 257)[..., None], 3, axis=2))
