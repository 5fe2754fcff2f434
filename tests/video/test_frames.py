"""Sampled frames of files whose frames are known, of folders, and reasons why there are none."""

import numpy as np
import pytest
from PIL import Image

from tests.video import videos
from vop_jax.errors import VideoError
from vop_jax.video.decode import SegmentReader
from vop_jax.video.frames import read_frames

F = 6


def test_frames_of_short_clips_and_small_sizes(tmp_path):
    path = videos.write(tmp_path / "a.mp4", 4)
    frames = read_frames(path, F)
    assert frames.indices == [0, 1, 2, 3, 3, 3]  # the last one repeats
    np.testing.assert_array_equal(frames.pixels[3], frames.pixels[5])
    assert read_frames(videos.write(tmp_path / "one.mp4", 1), F).indices == [0] * F
    assert read_frames(path, 1, short_side=24).pixels[0].shape == (24, 32, 3)
    assert read_frames(path, 1, short_side=99).pixels[0].shape == (48, 64, 3)  # never enlarged


def test_frames_at_a_rate(tmp_path):
    times = [100 * i for i in range(24)]
    for name, base in (("a.mp4", 1000), ("a.avi", 10)):  # decoders give an AVI's frames other times
        ticks = [time * base // 1000 for time in times]
        path = videos.write_numbered(tmp_path / name, ticks, base=base)
        whole, frames = read_frames(path, 24), read_frames(path, F, fps=3)
        assert whole.timestamps == pytest.approx(np.arange(24) / 10)
        assert frames.indices == [0, 4, 7, 10, 14, 17, 20]
        assert [videos.number_of(pixels) for pixels in frames.pixels] == frames.indices
        assert frames.timestamps == pytest.approx([0.0, 0.4, 0.7, 1.0, 1.4, 1.7, 2.0])
        assert read_frames(path, F, fps=100).indices == list(range(24))
    # 29.97 frames a second: "linspace" counts frames, the others seconds.
    milliseconds = [round(1001 / 30 * i) for i in range(100)]
    path = videos.write(tmp_path / "b.mp4", 100, milliseconds=milliseconds)
    assert read_frames(path, 2, fps=1, sampling="linspace").indices == [0, 29, 58, 87]
    assert read_frames(path, 2, fps=1).indices == [0, 30, 60, 90]


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
        (lambda path: path.write_bytes(b""), "zero bytes"),
        (lambda path: path.write_text("<html>not found</html>"), "not readable as video"),
        (holes, "truncated|damaged"),
        (videos.write_audio, "no video stream"),
        (lambda path: videos.write_audio(path, cover=True), "no video stream"),
        (lambda path: path.mkdir(), "a folder without pictures"),
        (lambda path: None, "no such file"),
        (lambda path: path.symlink_to("gone.mp4"), "a link to what is not there"),
    ],
)
def test_unusable_files_have_a_reason(tmp_path, damage, reason):
    path = tmp_path / "a.mp4"
    damage(path)
    with pytest.raises(VideoError, match=reason):
        read_frames(path, F)


def test_a_file_of_another_extension_is_suggested(tmp_path):
    videos.write(tmp_path / "a.webm", 5, codec="libvpx-vp9", width=32, height=32)
    for name in ("a", "a.mp4"):
        with pytest.raises(VideoError, match=r"^no such file, but there is a\.webm$"):
            read_frames(tmp_path / name, F)


def test_a_segment_that_a_truncated_file_lacks(tmp_path):
    """The segment misses more than the tenth of the whole file that may be missing."""
    path = tmp_path / "a.mp4"
    videos.write(path, 400, options={"movflags": "faststart"})  # 40 s
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    end = SegmentReader(path).packet_times()[-1]
    with pytest.raises(VideoError, match="truncated"):
        read_frames(path, F, start=end - 2, end=end + 3)
    assert read_frames(path, F, start=end - 5, end=end).count


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A video of 25 frames a second, and a folder of what ffmpeg would extract of it."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    videos.write(path, 60, rate=25)
    folder = path.with_suffix("")
    folder.mkdir()
    for i, pixels in enumerate(read_frames(path, 60).pixels):
        Image.fromarray(pixels).save(folder / f"{i + 1}.png")
    return path, folder


@pytest.mark.parametrize("sampling", ["uniform", "linspace", "segments"])
@pytest.mark.parametrize("fps", [0.0, 5.0])
def test_a_file_and_its_extracted_frames_are_the_same(film, sampling, fps):
    path, folder = film
    options = {"sampling": sampling, "fps": fps, "short_side": 24}
    for segment in ({}, {"start": 0.5, "end": 2.0}, {"end": 1.0}):
        of_file = read_frames(path, 7, **segment, **options)
        of_folder = read_frames(folder, 7, folder_fps=25.0, **segment, **options)
        assert (of_file.indices, of_file.count) == (of_folder.indices, of_folder.count)
        np.testing.assert_allclose(of_file.timestamps, of_folder.timestamps, atol=1e-6)
        np.testing.assert_array_equal(of_file.pixels, of_folder.pixels)


def test_folders_that_cannot_be_used(film, tmp_path):
    _, folder = film
    with pytest.raises(VideoError, match=r"seconds need config\.data\.folder_fps"):
        read_frames(folder, 4, end=30.0)
    with pytest.raises(VideoError, match="no frame between 9 and the end"):
        read_frames(folder, 4, start=9.0, folder_fps=25.0)
    assert np.isnan(read_frames(folder, 4).timestamps).all()
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"1\.jpg: not readable as a picture"):
        read_frames(tmp_path, 4)


def test_pictures_are_in_the_order_of_their_numbers_and_scaled_from_16_bits(tmp_path):
    levels = np.arange(0, 65536, 257, np.uint16).reshape(16, 16)
    for i in (1, 2, 10, 9):
        Image.fromarray(levels // 10 * i).save(tmp_path / f"frame_{i}.png")
        (tmp_path / f"._frame_{i}.png").write_bytes(b"what macOS adds on other disks")
    for i, pixels in zip((1, 2, 9, 10), read_frames(tmp_path, 4).pixels, strict=True):
        expected = (levels // 10 * i) >> 8
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))
