"""What a user calls, and what a user calls wrongly."""

import numpy as np
import pytest

import vop_jax
from tests import runs
from tests.data import videos
from vop_jax.data.frames import read_frames
from vop_jax.data.sampling import sample_indices


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("retriever")
    return root, runs.write_clip(root / "clip.safetensors")


@pytest.fixture(scope="module")
def retriever(places):
    return vop_jax.load(places[1])


def frames(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_rows_are_unit_and_float32(retriever, places):
    clip = videos.write(places[0] / "a.mp4", 5, width=40, height=24)
    for rows in (
        retriever.embed_text(["a squid is talking", "", "caf\u00e9 &amp; \u4f60\u597d"]),
        retriever.embed_frames(frames(2, 3, 20, 30, 3)),
        retriever.embed_videos([clip, str(clip)]),
    ):
        assert rows.dtype == np.float32 and rows.shape[1] == runs.CLIP.embed_dim
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "linspace"])
def test_videos_are_read_as_in_training(places, monkeypatch, sampling):
    """With stored_fps the F frames are taken of the stored ones, not of all."""
    retriever = vop_jax.load(places[1], frames=3)
    clip = videos.write(places[0] / "long.mp4", 53, rate=25, width=40, height=24)
    video = {"frames": 3, "short_side": 32, "stored_fps": 5.0, "sampling": sampling}
    monkeypatch.setattr(retriever, "_video", video)
    stored = read_frames(clip, 3, fps=5.0, short_side=32).pixels
    taken = np.stack([stored[i] for i in sample_indices(len(stored), 3, sampling)])
    np.testing.assert_array_equal(
        retriever.embed_videos([clip]), retriever.embed_frames(taken[None])
    )
    of_all = np.stack(read_frames(clip, 3, short_side=32, sampling=sampling).pixels)
    assert (retriever.embed_videos([clip]) != retriever.embed_frames(of_all[None])).any()


def test_nothing_in_nothing_out(retriever):
    empty = (0, runs.CLIP.embed_dim)
    assert retriever.embed_text([]).shape == empty
    assert retriever.embed_videos([]).shape == empty
    assert retriever.embed_frames(frames(0, 3, 16, 16, 3)).shape == empty


def test_a_row_does_not_depend_on_its_neighbours(retriever):
    many = frames(3, 2, 16, 16, 3)
    alone = retriever.embed_frames(many[1:2])
    np.testing.assert_allclose(retriever.embed_frames(many)[1:2], alone, atol=1e-6)


def test_long_texts_are_cut_and_said_so(retriever, caplog):
    long = retriever.embed_text(["word " * 100])
    assert "1 of 1 texts cut to 24 tokens" in caplog.text
    np.testing.assert_allclose(long, retriever.embed_text(["word " * 22]), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "argument", "error", "message"),
    [
        ("embed_text", "one text", TypeError, "list of strings"),
        ("embed_text", [3], vop_jax.UserError, "text 0 is of type int"),
        ("embed_videos", "a.mp4", TypeError, "list of files"),
        ("embed_videos", ["nowhere.mp4"], vop_jax.UserError, "nowhere.mp4: no such file"),
        ("embed_frames", frames(2, 16, 16, 3), ValueError, r"not uint8 \[2, 16, 16, 3\]"),
        ("embed_frames", frames(1, 2, 16, 16, 1), ValueError, "uint8"),
        ("embed_frames", np.zeros((1, 2, 16, 16, 3), np.float32), ValueError, "not float32"),
        ("embed_frames", frames(1, 0, 16, 16, 3), ValueError, "without frames"),
    ],
)
def test_misuse(retriever, method, argument, error, message):
    with pytest.raises(error, match=message):
        getattr(retriever, method)(argument)


def test_dtypes(places):
    with pytest.raises(vop_jax.UserError, match="dtype='float8': allowed are float32, bfloat16"):
        vop_jax.load(places[1], dtype="float8")
    text = ["a squid is talking"]
    rounded = vop_jax.load(places[1], dtype="bfloat16").embed_text(text)
    exact = vop_jax.load(places[1]).embed_text(text)
    assert rounded.dtype == np.float32 and (rounded * exact).sum() > 0.99
