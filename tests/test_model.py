"""Every method against a reference in float64, and what must hold of the encoders."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.reference_methods import Reference
from vop_jax.clip.kernels.attention import KeyValues, attention
from vop_jax.clip.model import Clip
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.storage.tensors import flatten
from vop_jax.tuning.adapters import Adapter
from vop_jax.tuning.methods import METHODS, MethodConfig

BATCH = 2  # one size, so that each encoder compiles once
DEPTH = {"visual": tiny.CLIP.vision_layers, "text": tiny.CLIP.text_layers}  # 3 and 2
BASE = MethodConfig(
    visual_prompts=3,
    text_prefix=2,
    text_suffix=1,
    specific_prompts=2,
    split_layer=2,
    adapter_width=5,
    frames=tiny.FRAMES,
)
VIDEO_METHODS = ("vop_p", "vop_c", "vop_f", "vop_f+p", "vop_f+c")
PLAIN = [name for name, row in METHODS.items() if not row.prompts and not row.adapter]
ABLATIONS = {
    "vop_c lstm": {"name": "vop_c", "cmm": "lstm"},
    "vop_c transformer": {"name": "vop_c", "cmm": "transformer"},
    "vop_c updating CLS": {"name": "vop_c", "cmm_role": "cls"},
    "vop_f+c updating CLS": {"name": "vop_f+c", "cmm_role": "cls", "cmm": "lstm"},
    "vop_p all specific": {"name": "vop_p", "specific_prompts": 3},
    "vop_f from the first layer": {"name": "vop_f", "split_layer": 0},
    "vop_f+p to the last layer": {"name": "vop_f+p", "split_layer": 3},
}
PARTLY = {
    "vop text only": {"name": "vop", "branches": "text"},
    "vop_f+c text only": {"name": "vop_f+c", "branches": "text"},
    "vop_c vision only": {"name": "vop_c", "branches": "visual"},
    "vop layer 1": {"name": "vop", "last_layer": 1},
    "vop layer 2": {"name": "vop", "first_layer": 2, "last_layer": 2},
    "vop_f+p from layer 2": {"name": "vop_f+p", "first_layer": 2},
    "vop released suffix": {"name": "vop", "suffix": "released"},
    "vop released suffix, layer 1": {"name": "vop", "suffix": "released", "last_layer": 1},
}
CONFIGS = {
    label: dataclasses.replace(BASE, **changes)
    for label, changes in (
        *((name, {"name": name}) for name in METHODS),
        *ABLATIONS.items(),
        *PARTLY.items(),
    )
}
VOP, CLIP = CONFIGS["vop"], CONFIGS["zero_shot"]


@functools.cache
def model_of(method):
    return tiny.model_and_params(method)


@functools.cache
def jitted(model, what):
    return jax.jit(lambda params, rows: model.apply({"params": params}, rows, method=what))


def frames_of(method, frames, params=None):
    """The features of all frames [B, F, E]."""
    model, own = model_of(method)
    return np.asarray(jitted(model, "encode_frames")(params or own, frames))


def text_of(method, ids):
    model, params = model_of(method)
    return np.asarray(jitted(model, "encode_text")(params, ids))


def captions(method, count=3, seed=1):
    return tiny.captions(count, method.text_slots(tiny.CLIP), seed)


def reference(method):
    _, params = model_of(method)
    return Reference(flatten(params), method, DEPTH, tiny.CLIP.patch_size)


@pytest.mark.parametrize(
    "label", [label for label in CONFIGS if label not in PLAIN[1:] and "suffix" not in label]
)
def test_video_features_equal_the_reference(label):
    frames, method = tiny.frames(BATCH, seed=1), CONFIGS[label]
    expected = np.array([reference(method).frames(clip) for clip in frames])
    assert np.abs(frames_of(method, frames) - expected).max() <= 1e-5


@pytest.mark.parametrize("label", ["zero_shot", "adapter_attn", "adapter_ffn", "vop", *PARTLY])
def test_text_features_equal_the_reference(label):
    ids, method = captions(CONFIGS[label]), CONFIGS[label]
    expected = np.array([reference(method).text(row) for row in ids])
    assert np.abs(text_of(method, ids) - expected).max() <= 1e-5


def test_without_added_parts_the_model_is_clip():
    assert all(set(model_of(CONFIGS[name])[1]) == {"clip"} for name in PLAIN)
    (_, params), frames, ids = model_of(CLIP), tiny.frames(BATCH), captions(CLIP)
    flat = frames.reshape(-1, *frames.shape[2:])
    image = jitted(Clip(tiny.CLIP), "encode_image")(params["clip"], flat)
    np.testing.assert_allclose(frames_of(CLIP, frames).reshape(len(flat), -1), image, atol=2e-7)
    text = jitted(Clip(tiny.CLIP), "encode_text")(params["clip"], ids)
    np.testing.assert_array_equal(text_of(CLIP, ids), text)


def change_by_order(method, params=None):
    """The largest change of a video's feature when its frames are permuted."""
    frames = tiny.frames(BATCH)
    permuted = frames_of(method, frames[:, [2, 0, 1]], params).mean(axis=1)
    return np.abs(permuted - frames_of(method, frames, params).mean(axis=1)).max()


ANY_ORDER = ("zero_shot", "adapter_attn", "adapter_ffn", "vop")
FRAMES_APART = (*ANY_ORDER, "vop_p", "vop_p all specific", "vop_f+p to the last layer")


@pytest.mark.parametrize("label", [*ANY_ORDER, *VIDEO_METHODS, *ABLATIONS])
def test_a_frame_reacts_to_order_and_to_others_of_its_video_where_the_method_says_so(label):
    method, frames = CONFIGS[label], tiny.frames(BATCH)
    by_order = change_by_order(method)
    assert by_order <= 1e-5 if label in ANY_ORDER else by_order > 1e-3
    other = frames.copy()
    other[1, 1] = tiny.frames(1, seed=9)[0, 1]
    change = np.abs(frames_of(method, frames) - frames_of(method, other)).max(axis=2)  # [B, F]
    assert change[1, 1] > 1e-2
    # An LSTM of one direction knows earlier frames only.
    neighbours = change[1, [2] if label == "vop_c lstm" else [0, 2]]
    assert (neighbours < 1e-6).all() if label in FRAMES_APART else (neighbours > 1e-4).all()
    assert (change[0] < 1e-6).all()  # videos of a batch do not mix


def test_function_prompts_know_the_order_by_the_frame_position_embedding_only():
    method = CONFIGS["vop_f"]
    _, params = model_of(method)
    zeroed = {**params["prompts"], "frame_position": 0 * params["prompts"]["frame_position"]}
    assert change_by_order(method, {**params, "prompts": zeroed}) <= 1e-5
    without = dataclasses.replace(method, frame_position=False)
    assert "frame_position" not in model_of(without)[1]["prompts"]
    assert change_by_order(without) <= 1e-5


@pytest.mark.parametrize("label", ["vop_f+p", "vop_f+c", "adapter_attn", "vop_c transformer"])
def test_shapes_are_those_of_a_whole_initialisation(label):
    partly = {"first_layer": 2, "last_layer": 2, "branches": "visual"}
    for changes in ({}, partly):
        model = TextVideoModel(tiny.CLIP, dataclasses.replace(CONFIGS[label], **changes))
        whole = flatten(jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"])
        assert model.shapes() == whole and list(model.shapes()) == list(whole)


@pytest.mark.parametrize("label", ["vop_f+c", "full"])
def test_initial_parameters_are_those_of_a_whole_initialisation(label):
    model, key = TextVideoModel(tiny.CLIP, CONFIGS[label]), jax.random.key(3)

    def without_clip(key):
        params = model.init(key, *model.example())["params"]
        return {part: values for part, values in params.items() if part != "clip"}

    whole, added = flatten(jax.jit(without_clip)(key)), flatten(jax.jit(model.init_added)(key))
    assert added.keys() == whole.keys() and bool(added) == (label != "full")
    for leaf, value in added.items():
        np.testing.assert_array_equal(value, whole[leaf], err_msg=leaf)


def test_adapters_start_as_the_identity():
    x = np.ones((2, 3, 8), np.float32)
    out, fresh = Adapter(8, 5).init_with_output(jax.random.key(1), x)
    assert not np.any(out) and np.any(fresh["params"]["down"]["kernel"])


def test_frame_tables_refuse_other_frame_counts_and_one_frame_is_enough():
    for name in VIDEO_METHODS:
        model, params = model_of(CONFIGS[name])
        encode = functools.partial(model.apply, method="encode_video")
        two = tiny.frames(BATCH)[:, :2]
        if name == "vop_c":  # has no table
            shape = jax.eval_shape(encode, {"params": params}, two).shape
            assert shape == (BATCH, tiny.CLIP.embed_dim)
        else:
            with pytest.raises(UserError, match="clips of 2 frames, but the prompts know 3 frame"):
                jax.eval_shape(encode, {"params": params}, two)
    one = dataclasses.replace(CONFIGS["vop_f+c"], frames=1)
    assert np.isfinite(frames_of(one, tiny.frames(BATCH)[:, :1])).all()


@pytest.mark.parametrize(
    "name",
    ["vop_f+c", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adapter_ffn", "vop_p"))],
)
def test_bfloat16_stays_close_and_features_are_float32_unit_rows(name):
    method = CONFIGS[name]
    _, params = model_of(method)
    half = TextVideoModel(tiny.CLIP, method, jnp.bfloat16)
    ids, frames = captions(method), tiny.frames(BATCH)
    for what, rows, exact in (
        ("encode_frames", frames, frames_of(method, frames)),
        ("encode_text", ids, text_of(method, ids)),
    ):
        rounded = np.asarray(jitted(half, what)(params, rows))
        assert rounded.dtype == exact.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rounded, axis=-1), 1, atol=1e-6)
        assert abs(exact - rounded).max() > 0
        assert ((exact * rounded).sum(axis=-1) > 0.98).all()


@pytest.mark.parametrize("name", ["vop_f", "zero_shot"])
def test_all_vision_layers_but_the_last_get_the_configured_kernel(monkeypatch, name):
    """Traced only: cuDNN's runs on a GPU."""
    implementations = []

    def spy(query, key, value, implementation):
        implementations.append(implementation)
        return attention(query, KeyValues(key, value))

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    model = TextVideoModel(tiny.CLIP, MethodConfig(name, frames=3), kernel="cudnn")
    jax.eval_shape(lambda key: model.init(key, *model.example()), jax.random.key(0))
    assert implementations == ["cudnn"] * (DEPTH["visual"] - 1)  # the last has few queries


@pytest.mark.parametrize("label", ["vop", "zero_shot", "adapter_attn", "vop layer 2"])
def test_fewer_slots_give_the_same_features(label):
    method = CONFIGS[label]
    ids = np.pad(tiny.captions(3, 10), ((0, 0), (0, method.text_slots(tiny.CLIP) - 10)))
    longest = int(ids.argmax(axis=1).max()) + 1
    expected = text_of(method, ids)
    np.testing.assert_allclose(text_of(method, ids[:, :longest]), expected, atol=1e-6)
    # One slot less truncates the EOT of the longest caption.
    assert abs(text_of(method, ids[:, : longest - 1]) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("label", "change"), [("vop", 1), ("vop released suffix", 1), ("vop released suffix", -1)]
)
def test_slots_that_the_method_does_not_take_are_an_error(label, change):
    method = CONFIGS[label]
    with pytest.raises(ValueError, match="slot"):
        text_of(method, tiny.captions(3, method.text_slots(tiny.CLIP) + change))


@pytest.mark.parametrize(
    ("label", "reads_suffix"),
    [("vop", [True, True, True]), ("vop released suffix", [False, False, True])],
)
def test_short_captions_never_read_the_released_suffix(label, reads_suffix):
    model, params = model_of(CONFIGS[label])
    slots = model.method.text_slots(tiny.CLIP)
    ids, rng = np.zeros((3, slots), np.int32), np.random.default_rng(0)
    for row, length in zip(ids, (3, 5, slots - 1), strict=True):
        row[:length], row[length] = rng.integers(1, tiny.EOT, length), tiny.EOT
    for part, reads in (
        (np.s_[:, : BASE.text_prefix], [True] * 3),
        (np.s_[:, BASE.text_prefix :], reads_suffix),
    ):
        prompts = params["prompts"]["text"].copy()  # [L, P, D]
        prompts[part] += 1
        changed = {**params, "prompts": {**params["prompts"], "text": prompts}}
        features = jitted(model, "encode_text")(changed, ids)
        assert (np.abs(features - text_of(CONFIGS[label], ids)).max(axis=1) > 0).tolist() == reads


def test_blocks_of_one_kind_are_traced_once():
    model, params = tiny.model_and_params(dataclasses.replace(BASE, name="vop"))
    encode = functools.partial(model.apply, {"params": params}, method="encode_video")
    traced = jax.make_jaxpr(encode)(tiny.frames(BATCH)).eqns
    blocks = [e.params["jaxpr"] for e in traced if e.params.get("name") == "run_block"]
    assert len(blocks) == DEPTH["visual"] == 3
    assert len({id(block) for block in blocks}) == 2  # the last one computes only CLS tokens
