"""What must hold of the prompted encoders whatever the weights are."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vop_jax.clip.model import Clip
from vop_jax.clip.weights import parameter_shapes
from vop_jax.data import tokenizer
from vop_jax.model import TextVideoModel
from vop_jax.storage.tensors import flatten
from vop_jax.tuning.methods import MethodConfig

SIZES: dict[str, Any] = {"visual_prompts": 3, "text_prefix": 2, "text_suffix": 2, "init_std": 0.5}
BATCH = 3  # one size, so that each encoder compiles once
VOP = MethodConfig(**SIZES)
PLAIN = MethodConfig("zero_shot", **SIZES)


@functools.cache
def jitted(model, what):
    return jax.jit(lambda params, rows: model.apply({"params": params}, rows, method=what))


def encode(model, params, what, rows):
    return np.asarray(jitted(model, f"encode_{what}")(params, rows))


def ids_of(method, count=BATCH, seed=0):
    return tiny.captions(count, method.text_slots(tiny.CLIP), seed)


def plain_video(clip_params, frames):
    """CLIP's own image encoder, frame by frame, and the mean of what it says."""
    flat = frames.reshape(-1, *frames.shape[2:])
    rows = encode(Clip(tiny.CLIP), clip_params, "image", flat)
    mean = rows.reshape(*frames.shape[:2], -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def plain_text(clip_params, ids):
    return encode(Clip(tiny.CLIP), clip_params, "text", ids)


def test_without_prompts_it_is_clip():
    model, params = tiny.model_and_params(PLAIN)
    assert set(params) == {"clip"}
    frames, ids = tiny.frames(BATCH), ids_of(PLAIN)
    video = encode(model, params, "video", frames)
    np.testing.assert_allclose(video, plain_video(params["clip"], frames), atol=2e-7)
    np.testing.assert_array_equal(
        encode(model, params, "text", ids), plain_text(params["clip"], ids)
    )


def test_one_frame_without_prompts_is_clips_image_encoder():
    model, params = tiny.model_and_params(PLAIN)
    frame = tiny.frames(BATCH)[:, :1]
    image = encode(Clip(tiny.CLIP), params["clip"], "image", frame[:, 0])
    np.testing.assert_allclose(encode(model, params, "video", frame), image, atol=2e-7)


def test_embeddings_are_float32_unit_rows():
    for dtype in (jnp.float32, jnp.bfloat16):
        _, params = tiny.model_and_params(VOP)
        model = TextVideoModel(tiny.CLIP, VOP, dtype)
        for what, rows in (("video", tiny.frames(BATCH)), ("text", ids_of(VOP))):
            out = encode(model, params, what, rows)
            assert out.dtype == np.float32 and out.shape == (len(rows), tiny.CLIP.embed_dim)
            np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("branches", "plain_video_tower", "plain_text_tower"),
    [("both", False, False), ("visual", False, True), ("text", True, False)],
)
def test_branches_leave_the_other_tower_plain(branches, plain_video_tower, plain_text_tower):
    method = dataclasses.replace(VOP, branches=branches)
    model, params = tiny.model_and_params(method)
    frames, ids = tiny.frames(BATCH), ids_of(method)
    video = abs(encode(model, params, "video", frames) - plain_video(params["clip"], frames)).max()
    text = abs(encode(model, params, "text", ids) - plain_text(params["clip"], ids)).max()
    assert (video < 1e-6) == plain_video_tower and (text < 1e-6) == plain_text_tower
    wanted = {
        name
        for name, on in (("visual", not plain_video_tower), ("text", not plain_text_tower))
        if on
    }
    assert set(params["prompts"]) == wanted


def test_a_frames_feature_depends_on_that_frame_alone():
    model, params = tiny.model_and_params(VOP)
    frames = tiny.frames(1)
    alone = encode(model, params, "video", frames[0][:, None])  # each frame a clip of its own
    mean = alone.mean(axis=0)
    together = encode(model, params, "video", frames)[0]
    np.testing.assert_allclose(together, mean / np.linalg.norm(mean), atol=1e-6)


def test_the_order_of_frames_does_not_matter():
    model, params = tiny.model_and_params(VOP)
    frames = tiny.frames(BATCH)
    shuffled = frames[:, [2, 0, 1]]
    np.testing.assert_allclose(
        encode(model, params, "video", frames), encode(model, params, "video", shuffled), atol=1e-5
    )


def test_videos_of_a_batch_do_not_mix():
    model, params = tiny.model_and_params(VOP)
    frames, ids = tiny.frames(BATCH), ids_of(VOP)
    for what, rows in (("video", frames), ("text", ids)):
        one_by_one = [encode(model, params, what, rows[i : i + 1])[0] for i in range(BATCH)]
        np.testing.assert_allclose(encode(model, params, what, rows), one_by_one, atol=1e-6)


@pytest.mark.parametrize("method", [VOP, PLAIN], ids=["vop", "zero_shot"])
def test_tokens_after_eot_do_not_matter(method):
    model, params = tiny.model_and_params(method)
    ids = ids_of(method)
    eot = ids.argmax(axis=1)
    noise = np.random.default_rng(1).integers(0, tiny.EOT - 1, ids.shape)
    other = np.where(np.arange(ids.shape[1]) > eot[:, None], noise, ids).astype(np.int32)
    assert (other != ids).any()
    np.testing.assert_array_equal(
        encode(model, params, "text", ids), encode(model, params, "text", other)
    )


@pytest.mark.parametrize(
    "method",
    [
        VOP,
        PLAIN,
        dataclasses.replace(VOP, first_layer=2),
        dataclasses.replace(VOP, last_layer=1),
        dataclasses.replace(VOP, suffix="released", branches="visual"),
        MethodConfig("adapter_attn", adapter_width=4),
        MethodConfig("adapter_ffn", adapter_width=4),
    ],
    ids=lambda method: f"{method.name}-{method.suffix}-{method.first_layer}-{method.last_layer}",
)
def test_fewer_slots_give_the_same_features(method):
    model, params = tiny.model_and_params(method)
    ids = tiny.captions(BATCH, 10)
    whole = np.pad(ids, ((0, 0), (0, method.text_slots(tiny.CLIP) - 10)))
    held = tokenizer.longest_length(ids)
    assert held <= 10 < whole.shape[1]
    expected = encode(model, params, "text", whole)
    for fewer in {held, 10}:
        found = encode(model, params, "text", whole[:, :fewer])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    # One slot less cuts the EOT of the longest caption off.
    assert abs(encode(model, params, "text", whole[:, : held - 1]) - expected).max() > 1e-3


def test_slots_that_the_method_does_not_take_are_an_error():
    for suffix, change in (("eot", 1), ("released", 1), ("released", -1)):
        method = dataclasses.replace(VOP, suffix=suffix)
        model, params = tiny.model_and_params(method)
        ids = tiny.captions(BATCH, method.text_slots(tiny.CLIP) + change)
        with pytest.raises(ValueError, match="slot"):
            model.apply({"params": params}, ids, method="encode_text")


def test_every_token_before_eot_matters():
    model, params = tiny.model_and_params(VOP)
    ids = ids_of(VOP, 1, seed=3)
    reference = encode(model, params, "text", ids)
    for slot in range(ids.argmax()):
        other = ids.copy()
        other[0, slot] = (ids[0, slot] + 1) % (tiny.EOT - 1)
        assert abs(encode(model, params, "text", other) - reference).max() > 1e-6, slot


def text_prompt_gradient(suffix, lengths):
    """The gradient of the text prompts, [L, P, D], for captions with EOT at these slots."""
    method = dataclasses.replace(VOP, suffix=suffix)
    model, params = tiny.model_and_params(method)
    ids = np.zeros((len(lengths), method.text_slots(tiny.CLIP)), np.int32)
    rng = np.random.default_rng(0)
    for row, length in zip(ids, lengths, strict=True):
        row[:length], row[length] = rng.integers(1, tiny.EOT, length), tiny.EOT
    return np.asarray(gradient_of_text(model)(params, ids)["prompts"]["text"])


@functools.cache
def gradient_of_text(model):
    def some_number(params, ids):
        rows = model.apply({"params": params}, ids, method="encode_text")
        return (rows * jnp.cos(jnp.arange(rows.size)).reshape(rows.shape)).sum()

    return jax.jit(jax.grad(some_number))


def test_the_released_suffix_is_dead_for_short_captions():
    prefix = VOP.text_prefix
    gradient = text_prompt_gradient("released", lengths=[3, 5, 7])
    assert (gradient[:, prefix:] == 0).all()
    assert (abs(gradient[:, :prefix]).max(axis=-1) > 0).all()


def test_the_released_suffix_lives_in_a_caption_that_fills_all_slots():
    last = VOP.text_slots(tiny.CLIP) - 1
    gradient = text_prompt_gradient("released", lengths=[3, 5, last])
    assert (abs(gradient).max(axis=-1) > 0).all()


def test_the_suffix_before_eot_lives_in_every_caption():
    gradient = text_prompt_gradient("eot", lengths=[3, 5, 7])
    assert (abs(gradient).max(axis=-1) > 0).all()


def test_both_suffixes_agree_where_eot_is_the_last_slot():
    rows = ids_of(VOP)
    rows[:] = np.random.default_rng(0).integers(1, tiny.EOT, rows.shape)
    rows[:, -1] = tiny.EOT
    model, params = tiny.model_and_params(VOP)
    released = TextVideoModel(tiny.CLIP, dataclasses.replace(VOP, suffix="released"))
    np.testing.assert_allclose(
        encode(model, params, "text", rows), encode(released, params, "text", rows), atol=1e-6
    )


@pytest.mark.parametrize("first_last", [(1, 1), (2, 2), (1, 2), (2, 0), (3, 3)])
def test_only_prompted_layers_have_prompts(first_last):
    first, last = first_last
    branches = "both" if first <= tiny.CLIP.text_layers else "visual"
    method = dataclasses.replace(VOP, first_layer=first, last_layer=last, branches=branches)
    _, params = tiny.model_and_params(method)
    depth = {"visual": tiny.CLIP.vision_layers, "text": tiny.CLIP.text_layers}
    for tower, prompts in params["prompts"].items():
        assert len(prompts) == min(last or depth[tower], depth[tower]) - first + 1


@functools.partial(jax.jit, static_argnums=1)
def video_by_hand(params, method, frames):
    """Vision layer by layer as in the paper's equations, one frame at a time."""
    clip = Clip(tiny.CLIP).bind({"params": params["clip"]})
    layers = method.layers(tiny.CLIP.vision_layers)
    features = []
    for frame in frames:
        tokens = clip.visual.embed(frame[None])[0]
        cls, patches = tokens[:1], tokens[1:]
        for layer, block in enumerate(clip.visual.blocks):
            here = params["prompts"]["visual"][layers.index(layer)] if layer in layers else cls[:0]
            sequence = jnp.concatenate([cls, here, patches])[None]
            if layer == 0:
                sequence = clip.visual.ln_pre(sequence)
            out = block(sequence)[0]
            cls, patches = out[:1], out[1 + len(here) :]
        feature = clip.visual.project(cls[0])
        features.append(feature / jnp.linalg.norm(feature))
    mean = sum(features) / len(features)
    return mean / jnp.linalg.norm(mean)


@pytest.mark.parametrize("first_last", [(1, 0), (1, 1), (2, 3)])
def test_vision_equals_the_equations(first_last):
    first, last = first_last
    method = dataclasses.replace(VOP, first_layer=first, last_layer=last, branches="visual")
    model, params = tiny.model_and_params(method)
    frames = tiny.frames(1)
    by_hand = video_by_hand(params, method, frames[0, :1])
    np.testing.assert_allclose(encode(model, params, "video", frames[:, :1])[0], by_hand, atol=1e-6)


@functools.partial(jax.jit, static_argnums=(1, 3))
def text_by_hand(params, method, caption, eot):
    """Text layer by layer for one caption, prompts put in and taken out of Python lists."""
    clip = Clip(tiny.CLIP).bind({"params": params["clip"]})
    layers = method.layers(tiny.CLIP.text_layers)
    end = eot if method.suffix == "eot" else len(caption) - 1
    words = list(clip.text.embed(caption[None])[0])
    for layer, block in enumerate(clip.text.blocks):
        prefix, suffix = [], []
        if layer in layers:
            prompts = list(params["prompts"]["text"][layers.index(layer)])
            prefix, suffix = prompts[: method.text_prefix], prompts[method.text_prefix :]
        x = jnp.stack([words[0], *prefix, *words[1:end], *suffix, *words[end:]])[None]
        if layer == 0:
            x = x + clip.text.positions(jnp.arange(x.shape[1])[None])
        out = list(block(x)[0])
        read = out[eot + len(prefix) + len(suffix)]
        start, stop = 1 + len(prefix), end + len(prefix)
        words = [out[0], *out[start:stop], *out[stop + len(suffix) :]]
    feature = clip.text.project(read)
    return feature / jnp.linalg.norm(feature)


@pytest.mark.parametrize("suffix", ["eot", "released"])
@pytest.mark.parametrize("first_last", [(1, 0), (1, 1), (2, 2)])
def test_text_equals_the_equations(first_last, suffix):
    first, last = first_last
    method = dataclasses.replace(VOP, first_layer=first, last_layer=last, suffix=suffix)
    model, params = tiny.model_and_params(method)
    caption = ids_of(method, 1)[0]
    assert 1 < caption.argmax() < len(caption) - 1
    by_hand = text_by_hand(params, method, caption, int(caption.argmax()))
    np.testing.assert_allclose(encode(model, params, "text", caption[None])[0], by_hand, atol=1e-6)


def test_bfloat16_is_close_to_float32():
    model, params = tiny.model_and_params(VOP)
    half = TextVideoModel(tiny.CLIP, VOP, jnp.bfloat16)
    for what, rows in (("video", tiny.frames(BATCH)), ("text", ids_of(VOP))):
        exact, rounded = encode(model, params, what, rows), encode(half, params, what, rows)
        assert abs(exact - rounded).max() > 0
        assert ((exact * rounded).sum(axis=-1) > 0.999).all()


def test_the_clip_subtree_is_exactly_a_converted_file():
    for method in (VOP, PLAIN):
        _, params = tiny.model_and_params(method)
        shapes = {name: leaf.shape for name, leaf in flatten(params["clip"]).items()}
        assert shapes == parameter_shapes(tiny.CLIP)


def test_captions_of_another_length_are_refused():
    model, params = tiny.model_and_params(VOP)
    with pytest.raises(ValueError, match="captions have 20 token slots, the method 16"):
        encode(model, params, "text", tiny.captions(1, 20))
