"""Texts, pictures and videos become vectors; wrong calls are refused."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import pytest

import vop_jax
from tests import runs
from tests.video import videos
from vop_jax.clip.weights import load_clip
from vop_jax.inference.backbone import BATCH_SIZES
from vop_jax.model import TextVideoModel
from vop_jax.storage.tensors import unflatten
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import partition
from vop_jax.tuning.prompt_set import PromptSet, save_prompts
from vop_jax.video.frames import read_frames
from vop_jax.video.sampling import sample_indices


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("retriever")
    return root, runs.write_clip(root / "clip.safetensors")


@pytest.fixture(scope="module")
def retriever(places):
    return vop_jax.load(places[1], frames=3, devices=1)


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


def test_videos_are_read_as_in_training(retriever, places, monkeypatch):
    """With stored_fps the F frames are sampled from the stored ones, not from all."""
    clip = videos.write(places[0] / "long.mp4", 53, rate=25, width=40, height=24)
    for sampling in ("uniform", "linspace"):
        video = {"frames": 3, "short_side": 32, "stored_fps": 5.0, "sampling": sampling}
        monkeypatch.setattr(retriever, "_video", {**retriever._video, **video})
        stored = read_frames(clip, 3, fps=5.0, short_side=32).pixels
        sampled = np.stack([stored[i] for i in sample_indices(len(stored), 3, sampling)])
        vectors = retriever.embed_videos([clip])
        np.testing.assert_array_equal(vectors, retriever.embed_frames(sampled[None]))
        of_all = np.stack(read_frames(clip, 3, short_side=32, sampling=sampling).pixels)
        assert (vectors != retriever.embed_frames(of_all[None])).any()
    segment = retriever.sample(clip, 0.8, 1.6)
    assert len(segment.pixels) == len(segment.timestamps) == 3
    assert 0.8 <= min(segment.timestamps) < max(segment.timestamps) < 1.6
    assert segment.timestamps == sorted(segment.timestamps)


def test_no_rows_give_no_vectors(retriever):
    empty = (0, runs.CLIP.embed_dim)
    for method in ("images", "text", "videos"):
        assert getattr(retriever, f"embed_{method}")([]).shape == empty
    assert retriever.embed_frames(frames(0, 3, 16, 16, 3)).shape == empty


def test_long_texts_are_truncated_and_counted(retriever, caplog):
    long = retriever.embed_text(["word " * 100])
    assert "1 of 1 texts truncated to 24 tokens" in caplog.text
    np.testing.assert_allclose(long, retriever.embed_text(["word " * 22]), atol=1e-6)
    assert retriever.count_truncated(["short", "word " * 100, "word " * 99]) == 2


@pytest.mark.parametrize(
    ("method", "argument", "error", "message"),
    [
        ("embed_text", "one text", TypeError, "list of strings"),
        ("embed_text", [3], vop_jax.UserError, "text 0 is of type int"),
        ("embed_videos", "a.mp4", TypeError, "list of files"),
        ("embed_videos", ["nowhere.mp4"], vop_jax.UserError, "nowhere.mp4: no such file"),
        ("embed_videos", ["rtsp://host/x"], vop_jax.UserError, r"/x: an address .rtsp://"),
        ("embed_videos", [""], vop_jax.UserError, ": no such file"),
        ("embed_videos", ["a\0b.mp4"], vop_jax.UserError, "not the name of a file"),
        ("embed_frames", frames(2, 16, 16, 3), ValueError, r"not uint8 \[2, 16, 16, 3\]"),
        ("embed_frames", frames(1, 2, 16, 16, 1), ValueError, "uint8"),
        ("embed_frames", np.zeros((1, 2, 16, 16, 3), np.float32), ValueError, "not float32"),
        ("embed_frames", frames(1, 0, 16, 16, 3), ValueError, "without frames"),
    ],
)
def test_misuse(retriever, method, argument, error, message):
    with pytest.raises(error, match=message):
        getattr(retriever, method)(argument)


def test_bfloat16_gives_nearly_the_vectors_of_float32(retriever, places):
    text = ["a squid is talking"]
    rounded = vop_jax.load(places[1], dtype="bfloat16", devices=1).embed_text(text)
    assert rounded.dtype == np.float32 and (rounded * retriever.embed_text(text)).sum() > 0.99


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8': allowed are auto, float32, bfloat16"),
        ({"frames": 0}, "frames=0: must be 1 or more"),
        ({"devices": 9}, "devices=9: must be 1 to 8"),
    ],
)
def test_wrong_arguments_of_load(places, argument, message):
    with pytest.raises(vop_jax.UserError, match=message):
        vop_jax.load(places[1], **argument)


def write_prompts(path, clip, seed, name="vop"):
    """Prompts of random trained parameters over the CLIP."""
    weights = load_clip(clip)
    method = MethodConfig(name, visual_prompts=2, specific_prompts=1, text_prefix=1, text_suffix=1)
    method = dataclasses.replace(method, frames=3)
    rng = np.random.default_rng(seed)
    shapes = TextVideoModel(weights.config, method).shapes()
    params = {name: rng.normal(0, 1, leaf.shape).astype("f4") for name, leaf in shapes.items()}
    trained, _ = partition(unflatten(params), method.trainable_patterns(weights.config))
    about = weights.fingerprint, weights.name, weights.config, {"frames": 3}
    save_prompts(path, PromptSet(trained, method, *about))
    return path


@pytest.fixture(scope="module")
def prompts(places):
    return [write_prompts(places[0] / f"{i}.safetensors", places[1], i) for i in range(2)]


def test_prompt_sets_share_the_clip_and_the_programs(retriever, places, prompts):
    text, clips = ["a squid is talking"], frames(2, 3, 16, 16, 3)
    sets = [retriever.with_prompts(path) for path in prompts]
    vectors = [(r.embed_text(text), r.embed_frames(clips)) for r in sets]
    programs = len(retriever._backbone._programs)
    alone = vop_jax.load(places[1], prompts[1], devices=1)
    np.testing.assert_allclose(alone.embed_text(text), vectors[1][0], atol=1e-6)
    np.testing.assert_allclose(alone.embed_frames(clips), vectors[1][1], atol=1e-6)
    assert np.abs(vectors[0][0] - vectors[1][0]).max() > 0.01
    assert len({r.prompts_fingerprint for r in (retriever, *sets)}) == 3
    again = sets[1].with_prompts(prompts[0])
    np.testing.assert_array_equal(again.embed_text(text), vectors[0][0])
    assert again.prompts_fingerprint == sets[0].prompts_fingerprint
    assert len(retriever._backbone._programs) == programs
    assert sets[0]._backbone is sets[1]._backbone
    assert set(sets[0]._trained) == {"prompts/text", "prompts/visual"}
    plain = sets[0].with_prompts(None)
    np.testing.assert_array_equal(plain.embed_text(text), retriever.embed_text(text))


def test_a_method_that_tunes_clip_leaves_the_shared_one_alone(retriever, places):
    text = ["a squid is talking"]
    before = retriever.embed_text(text)
    tuned = retriever.with_prompts(write_prompts(places[0] / "full", places[1], 5, "full"))
    assert np.abs(tuned.embed_text(text) - before).max() > 0.01
    np.testing.assert_array_equal(retriever.embed_text(text), before)


def test_prompts_of_another_clip_are_refused(retriever, places):
    other = runs.write_clip(places[0] / "other.safetensors", seed=1)
    path = write_prompts(places[0] / "others.safetensors", other, 0)
    with pytest.raises(vop_jax.UserError, match=r"trained over .* seed 1 .* the given .* seed 0"):
        retriever.with_prompts(path)


def test_compiled_ahead(retriever, monkeypatch):
    monkeypatch.setattr(retriever._backbone, "_programs", {})
    retriever.compile()
    programs = set(retriever._backbone._programs)
    assert len(programs) == 3
    pixels = frames(1, 3, 24, 32, 3)
    retriever.embed_text(["a dog"])
    retriever.embed_frames(pixels)
    retriever.embed_each_frame(pixels)
    retriever.embed_images([pixels[0, 0]])
    assert set(retriever._backbone._programs) == programs


def test_two_programs_for_all_sizes_of_batch(retriever, monkeypatch):
    monkeypatch.setattr(retriever._backbone, "_programs", {})
    monkeypatch.setitem(BATCH_SIZES, "encode_text", (1, 4))
    texts = [f"text number {i}" for i in range(11)]
    whole = retriever.embed_text(texts)
    for count in range(1, 10):
        np.testing.assert_allclose(retriever.embed_text(texts[:count]), whole[:count], atol=1e-6)
    assert len(retriever._backbone._programs) == 2


def test_a_cpu_embeds_clips_one_by_one_in_bfloat16(places, monkeypatch):
    rounded = vop_jax.load(places[1], frames=3, devices=1, dtype="bfloat16")
    clips = frames(5, 3, 16, 16, 3)
    one_by_one = rounded.embed_frames(clips)
    assert len(rounded._backbone._programs) == 1
    monkeypatch.setattr(rounded._backbone, "_batch_sizes", BATCH_SIZES)
    np.testing.assert_allclose(rounded.embed_frames(clips), one_by_one, atol=0.02)
    assert len(rounded._backbone._programs) == 2


def test_all_devices_give_the_vectors_of_one(retriever, places):
    assert len(jax.local_devices()) > 1
    many = vop_jax.load(places[1])
    texts, clips = [f"text number {i}" for i in range(11)], frames(11, 3, 16, 16, 3)
    np.testing.assert_allclose(many.embed_text(texts), retriever.embed_text(texts), atol=1e-6)
    np.testing.assert_allclose(many.embed_frames(clips), retriever.embed_frames(clips), atol=1e-6)


def test_threads_share_it(retriever, prompts):
    """Each thread has its own texts and prompts, as in a server."""
    sets = [retriever.with_prompts(path) for path in prompts]
    calls = [(sets[i % 2], [f"query {i} {j}" for j in range(1 + i % 4)]) for i in range(60)]
    alone = [prompts.embed_text(texts) for prompts, texts in calls]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda call: call[0].embed_text(call[1]), calls))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_clip_is_the_mean_of_its_frames(retriever):
    clips = frames(2, 3, 20, 30, 3)
    each = retriever.embed_each_frame(clips)
    assert each.shape == (2, 3, runs.CLIP.embed_dim)
    mean = each.mean(axis=1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(mean, retriever.embed_frames(clips), atol=1e-6)


def test_a_picture_is_a_video_that_stands_still(retriever, prompts):
    retriever = retriever.with_prompts(prompts[0])
    images = [frames(20, 30, 3), frames(16, 40, 3)[:, ::-1]]
    still = [retriever.embed_frames(image[None, None].repeat(3, axis=1)) for image in images]
    np.testing.assert_allclose(retriever.embed_images(images), np.concatenate(still), atol=1e-6)
