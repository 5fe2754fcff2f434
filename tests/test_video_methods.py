"""Every method of the paper: against a reference, and what must hold of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.reference_methods import Reference
from vop_jax.clip.kernels.attention import KeyValues, attention
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.storage.tensors import flatten, unflatten
from vop_jax.tuning.adapters import Adapter
from vop_jax.tuning.methods import METHODS, MethodConfig

BATCH = 2
SPLIT = 2  # of three layers
VIDEO_METHODS = ("vop_p", "vop_c", "vop_f", "vop_f+p", "vop_f+c")
BASE = MethodConfig(
    visual_prompts=3,
    text_prefix=2,
    text_suffix=1,
    specific_prompts=2,
    split_layer=SPLIT,
    adapter_width=5,
    frames=tiny.FRAMES,
)
PARTLY = (
    {"first_layer": 2, "last_layer": 2, "branches": "visual"},
    {"split_layer": 0, "branches": "text"},
)
ABLATIONS = {
    "vop_c lstm": {"name": "vop_c", "cmm": "lstm"},
    "vop_c transformer": {"name": "vop_c", "cmm": "transformer"},
    "vop_c updating CLS": {"name": "vop_c", "cmm_role": "cls"},
    "vop_f+c updating CLS": {"name": "vop_f+c", "cmm_role": "cls", "cmm": "lstm"},
    "vop_p all specific": {"name": "vop_p", "specific_prompts": 3},
    "vop_f from the first layer": {"name": "vop_f", "split_layer": 0},
    "vop_f+p to the last layer": {"name": "vop_f+p", "split_layer": 3},
}


def configured(name, **changes):
    return dataclasses.replace(BASE, name=name, **changes)


def all_configs():
    plain = {name: configured(name) for name in METHODS}
    return plain | {label: configured(**changes) for label, changes in ABLATIONS.items()}


@functools.cache
def made(method):
    return tiny.model_and_params(method)


@functools.cache
def jitted(model, what):
    return jax.jit(lambda params, rows: model.apply({"params": params}, rows, method=what))


def video_of(method, frames, params=None):
    model, own = made(method)
    return np.asarray(jitted(model, "encode_video")(own if params is None else params, frames))


def text_of(method, ids):
    model, params = made(method)
    return np.asarray(jitted(model, "encode_text")(params, ids))


def reference(method):
    _, params = made(method)
    depth = {"visual": tiny.CLIP.vision_layers, "text": tiny.CLIP.text_layers}
    return Reference(
        flatten(params),
        method.name,
        depth,
        tiny.CLIP.patch_size,
        method.split_layer,
        method.text_prefix,
        method.cmm,
        method.cmm_role,
    )


@pytest.mark.parametrize("label", all_configs())
def test_features_equal_the_reference(label):
    method = all_configs()[label]
    frames = tiny.frames(BATCH, seed=1)
    expected = np.array([reference(method).video(clip) for clip in frames])
    assert np.abs(video_of(method, frames) - expected).max() <= 1e-5
    ids = tiny.captions(3, method.text_slots(tiny.CLIP), seed=1)
    expected = np.array([reference(method).text(row) for row in ids])
    assert np.abs(text_of(method, ids) - expected).max() <= 1e-5


@pytest.mark.parametrize("label", ["zero_shot", "adapter_attn", "vop", *VIDEO_METHODS, *ABLATIONS])
def test_shapes_are_those_of_a_whole_initialisation(label):
    for changes in ({}, *PARTLY):
        model = TextVideoModel(tiny.CLIP, dataclasses.replace(all_configs()[label], **changes))
        whole = flatten(jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"])
        assert model.shapes() == whole and list(model.shapes()) == list(whole)


@pytest.mark.parametrize("name", ["vop_f+c", "adapter_attn", "full"])
def test_fresh_parameters_are_those_of_a_whole_initialisation(name):
    model, key = TextVideoModel(tiny.CLIP, configured(name)), jax.random.key(3)

    def of_all(key):
        params = model.init(key, *model.example())["params"]
        return {part: values for part, values in params.items() if part != "clip"}

    whole, added = flatten(jax.jit(of_all)(key)), flatten(jax.jit(model.init_added)(key))
    assert added.keys() == whole.keys() and bool(added) == (name != "full")
    for leaf, value in added.items():
        np.testing.assert_array_equal(value, whole[leaf], err_msg=leaf)


def change_by_order(method, params=None):
    """The largest change of a feature when the frames of its clip are permuted."""
    frames = tiny.frames(BATCH)
    permuted = video_of(method, frames[:, [2, 0, 1]], params)
    return np.abs(permuted - video_of(method, frames, params)).max()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in VIDEO_METHODS])
def test_what_averages_frames_is_blind_to_their_order(name):
    assert change_by_order(configured(name)) <= 1e-5


@pytest.mark.parametrize("label", [*VIDEO_METHODS, *ABLATIONS])
def test_video_prompts_know_the_order_of_frames(label):
    assert change_by_order(all_configs()[label]) > 1e-3


@pytest.mark.parametrize("split", [0, SPLIT])
def test_function_prompts_alone_know_order_by_the_frame_position_embedding_only(split):
    method = configured("vop_f", split_layer=split)
    _, params = made(method)
    zeroed = {**params["prompts"], "frame_position": 0 * params["prompts"]["frame_position"]}
    assert change_by_order(method, {**params, "prompts": zeroed}) <= 1e-5
    without = configured("vop_f", split_layer=split, frame_position=False)
    assert "frame_position" not in made(without)[1]["prompts"]
    assert change_by_order(without) <= 1e-5


def reacts_to_other_frames(method):
    """Whether the features of the other frames change with one frame of a clip."""
    model, params = made(method)
    frames = tiny.frames(1)
    other = np.concatenate([frames[:, :1], tiny.frames(1, seed=9)[:, 1:2], frames[:, 2:]], axis=1)
    features = jitted(model, "encode_frames")
    change = np.abs(features(params, frames) - features(params, other)).max(axis=(0, 2))  # [F]
    assert change[1] > 1e-2
    assert (change[[0, 2]] < 1e-6).all() or (change[[0, 2]] > 1e-4).all()
    return change[0] > 1e-4


@pytest.mark.parametrize("name", [n for n in METHODS if n not in VIDEO_METHODS] + ["vop_p"])
def test_a_frame_is_read_alone_where_nothing_joins_frames(name):
    assert not reacts_to_other_frames(configured(name))


@pytest.mark.parametrize("label", ["vop_c", "vop_f", "vop_f+p", "vop_f+c", "vop_c updating CLS"])
def test_frames_read_each_other_where_a_part_joins_them(label):
    assert reacts_to_other_frames(all_configs()[label])


def test_a_split_behind_the_last_layer_is_plain_vop():
    last = tiny.CLIP.vision_layers
    function, plain = configured("vop_f", split_layer=last), configured("vop")
    assert flatten(made(function)[1]).keys() == flatten(made(plain)[1]).keys()
    frames = tiny.frames(BATCH)
    params = made(plain)[1]
    np.testing.assert_array_equal(video_of(function, frames, params), video_of(plain, frames))


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("vop")])
def test_without_prompts_in_it_a_tower_is_plain_clip(name):
    frames, plain = tiny.frames(BATCH), configured("zero_shot")
    method = configured(name, branches="text")
    params = {**made(plain)[1], "prompts": made(method)[1]["prompts"]}
    np.testing.assert_array_equal(video_of(method, frames, params), video_of(plain, frames))
    assert set(made(configured(name, branches="visual"))[1]["prompts"]).isdisjoint({"text"})


@pytest.mark.parametrize("name", ["adapter_attn", "adapter_ffn"])
def test_adapters_start_as_the_identity(name):
    x = np.ones((2, 3, 8), np.float32)
    out, fresh = Adapter(8, 5).init_with_output(jax.random.key(1), x)
    assert not np.any(out) and np.any(fresh["params"]["down"]["kernel"])
    method, plain = configured(name), configured("zero_shot")
    _, params = made(method)
    silent = {k: 0 * v if "/up/" in k else v for k, v in flatten(params["adapters"]).items()}
    frames = tiny.frames(BATCH)
    np.testing.assert_allclose(
        video_of(method, frames, {**params, "adapters": unflatten(silent)}),
        video_of(plain, frames, {"clip": params["clip"]}),
        atol=1e-7,
    )


def test_a_table_of_positions_refuses_other_frame_counts():
    frames = tiny.frames(BATCH)[:, :2]
    for name in ("vop_p", "vop_f", "vop_f+c"):
        with pytest.raises(UserError, match="clips of 2 frames, but the prompts know 3 frame"):
            video_of(configured(name), frames)
    assert video_of(configured("vop_c"), frames).shape == (BATCH, tiny.CLIP.embed_dim)


@pytest.mark.parametrize("name", VIDEO_METHODS)
def test_a_clip_of_one_frame_will_do(name):
    method = configured(name, frames=1)
    assert np.isfinite(video_of(method, tiny.frames(BATCH)[:, :1])).all()


@pytest.mark.parametrize("name", VIDEO_METHODS)
def test_videos_of_a_batch_do_not_mix(name):
    method, frames = configured(name), tiny.frames(BATCH)
    one_by_one = [video_of(method, frames[i : i + 1])[0] for i in range(BATCH)]
    np.testing.assert_allclose(video_of(method, frames), one_by_one, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        *("vop_p", "vop_f+c", "adapter_ffn"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vop_c", "vop_f", "vop_f+p")),
    ],
)
def test_bfloat16_stays_close(name):
    method = configured(name)
    _, params = made(method)
    half = TextVideoModel(tiny.CLIP, method, jnp.bfloat16)
    frames = tiny.frames(BATCH)
    rounded = np.asarray(jitted(half, "encode_video")(params, frames))
    assert rounded.dtype == np.float32
    assert (rounded * video_of(method, frames)).sum(axis=-1).min() > 0.98


@pytest.mark.parametrize("name", ["vop_f", "vop_c", "vop", "zero_shot"])
def test_all_vision_layers_but_the_last_get_the_fused_kernel(monkeypatch, name):
    """Which is asked for, that is; cuDNN's runs on a GPU only."""
    asked = []

    def spy(query, key, value, implementation):
        asked.append(implementation)
        return attention(query, KeyValues(key, value))

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    method = MethodConfig(name, frames=3)
    model = TextVideoModel(tiny.CLIP, method, kernel="cudnn")
    jax.eval_shape(lambda key: model.init(key, *model.example()), jax.random.key(0))
    assert asked == ["cudnn"] * (tiny.CLIP.vision_layers - 1)  # few queries of the last are read
