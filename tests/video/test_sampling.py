"""Which frames are taken, by each rule, and from whatever a clip is."""

import io

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Preprocessing, encode_clip
from vop_jax.data.records.example import Example
from vop_jax.data.records.write import WriteOptions, pack
from vop_jax.errors import VideoError
from vop_jax.video.frames import read_frames
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


def test_the_frames_of_a_file_of_29_97_frames_a_second(tmp_path):
    milliseconds = [round(1001 / 30 * i) for i in range(100)]
    path = videos.write(tmp_path / "a.mp4", 100, milliseconds=milliseconds)
    assert read_frames(path, 2, fps=1, sampling="linspace").indices == [0, 29, 58, 87]
    assert read_frames(path, 2, fps=1).indices == [0, 30, 60, 90]


def test_segments_are_drawn_evenly():
    rng = np.random.default_rng(0)
    drawn = {tuple(sample_indices(11, 3, "segments", rng)) for _ in range(2000)}
    assert len(drawn) == 27 and max(max(d) for d in drawn) == 8  # 3 of each 3, the last 2 never


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A video of 25 frames a second, and a folder of what ffmpeg would extract of it."""
    root = tmp_path_factory.mktemp("film")
    path = videos.write(root / "film.mp4", 60, rate=25, width=320, height=240)
    folder = root / "film"
    folder.mkdir()
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            Image.fromarray(frame.to_ndarray(format="rgb24")).save(folder / f"{i + 1}.png")
    return path, folder


@pytest.mark.parametrize("sampling", ["uniform", "linspace", "segments"])
@pytest.mark.parametrize("stretch", [{}, {"start": 0.5, "end": 2.0}, {"end": 1.0}])
def test_a_file_and_its_extracted_frames_are_the_same(film, sampling, stretch):
    path, folder = film
    for fps in (0.0, 5.0):
        options = {**stretch, "sampling": sampling, "fps": fps, "short_side": 96}
        of_file = read_frames(path, 7, **options)
        of_folder = read_frames(folder, 7, folder_fps=25.0, **options)
        assert of_file.indices == of_folder.indices
        assert of_file.count == of_folder.count
        np.testing.assert_allclose(of_file.timestamps, of_folder.timestamps, atol=1e-6)
        for one, other in zip(of_file.pixels, of_folder.pixels, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sampling", ["uniform", "linspace", "segments"])
def test_records_hold_these_frames_within_what_jpeg_changes(film, sampling, tmp_path):
    path, folder = film
    preprocessing = Preprocessing(frames=6, sampling=sampling, short_side=96)
    options = WriteOptions(1, isolated=False, progress=False)
    for source in (path, folder):
        clips = {"test": [VideoClip("film", str(source), ("a film",))]}
        split = pack(clips, tmp_path / source.name, preprocessing, options=options).splits["test"]
        expected = read_frames(path, 6, sampling=sampling, short_side=96)
        record = Example.FromString(split._source[0]).features.feature
        assert list(record["indices"].integers.value) == expected.indices
        for jpeg, pixels in zip(split[0], expected.pixels, strict=True):
            stored = np.asarray(Image.open(io.BytesIO(jpeg)))
            assert np.abs(stored.astype(int) - pixels).mean() < 2


def test_folders_that_cannot_be_used(film, tmp_path):
    _, folder = film
    with pytest.raises(VideoError, match=r"seconds need config\.data\.folder_fps"):
        read_frames(folder, 4, end=30.0)
    with pytest.raises(VideoError, match="a folder without pictures"):
        read_frames(tmp_path, 4)
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"1\.jpg: not readable as a picture"):
        read_frames(tmp_path, 4)
    with pytest.raises(VideoError, match="no frame between 9 and the end"):
        read_frames(folder, 4, start=9.0, folder_fps=25.0)
    assert np.isnan(read_frames(folder, 4).timestamps).all()


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for i in (1, 2, 10, 9):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"frame_{i}.png")
        (tmp_path / f"._frame_{i}.png").write_bytes(b"what macOS adds on other disks")
    frames = read_frames(tmp_path, 4)
    assert [int(p[0, 0, 0]) // 20 for p in frames.pixels] == [1, 2, 9, 10]


def test_short_clips_are_skipped_or_repeat(tmp_path):
    clip = VideoClip("x", str(videos.write(tmp_path / "x.mp4", 3)), ("x",))
    for sampling in ("uniform", "linspace", "segments"):
        with pytest.raises(VideoError, match=r"3 frames, fewer than config.data.frames=5"):
            encode_clip(clip, Preprocessing(frames=5, sampling=sampling))
        repeating = Preprocessing(frames=5, sampling=sampling, short_clips="repeat")
        assert len(encode_clip(clip, repeating).jpegs) == 5
