"""A prompt set on disk, the CLIP it belongs to, and its frame tables."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import partition
from vop_jax.tuning.prompt_set import (
    FORMAT,
    PromptSet,
    check_same_clip,
    has_frame_tables,
    interpolate_frames,
    load_prompts,
    save_prompts,
)

METHOD = MethodConfig(
    visual_prompts=2, text_prefix=1, text_suffix=2, specific_prompts=1, suffix="released"
)
VIDEO = {"frames": 7, "short_side": 128, "stored_fps": 2.0}


def random_params(method=METHOD):
    rng = np.random.default_rng(0)
    shapes = tensors.unflatten(TextVideoModel(tiny.CLIP, method).shapes())
    trainable, _ = partition(shapes, method.trainable_patterns(tiny.CLIP))
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), trainable)


def save(path, params, method=METHOD, video=VIDEO):
    about = "f" * 64, "tiny from x.pt (ffff)", tiny.CLIP
    save_prompts(path, PromptSet(params, method, *about, video))


def test_round_trip_of_every_method(tmp_path):
    path = tmp_path / "p.safetensors"
    for name in METHODS:
        method = dataclasses.replace(METHOD, name=name)
        params = random_params(method)
        save(path, params, method)
        prompts = load_prompts(path)
        assert (prompts.method, prompts.clip_config, prompts.video) == (method, tiny.CLIP, VIDEO)
        assert (prompts.clip_fingerprint, prompts.clip_name) == ("f" * 64, "tiny from x.pt (ffff)")
        saved, loaded = tensors.flatten(params), tensors.flatten(prompts.params)
        assert saved.keys() == loaded.keys()
        assert all((saved[key] == loaded[key]).all() for key in saved)
    metadata = tensors.read_metadata(path)
    assert metadata["format"] == FORMAT and metadata["method"] == name
    assert metadata["activation"] == "quick_gelu" and metadata["clip_fingerprint"] == "f" * 64
    save(path, params, method, video={})
    assert load_prompts(path).video == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "vop_jax.clip"}, "p: not a prompts file; --mode=export writes one"),
        ({"video": "3"}, "p: its metadata is not a prompts file's"),
        ({"video": "[" * 100_000}, "p: its metadata is not a prompts file's"),
        ({"clip_name": None}, "p: its metadata is not a prompts file's"),
        ({"method_config": '{"name": "vop_2"}'}, r"method.name='vop_2': allowed are"),
    ],
)
def test_a_file_that_is_no_prompt_set_is_refused(changes, message, tmp_path):
    path = tmp_path / "p"
    save(path, random_params())
    tree, metadata = tensors.load(path)
    tensors.save(path, tree, {k: v for k, v in (metadata | changes).items() if v is not None})
    with pytest.raises(UserError, match=message):
        load_prompts(path)


def test_prompts_over_another_clip_are_refused_naming_both(tmp_path):
    save(tmp_path / "p", random_params())
    prompts = load_prompts(tmp_path / "p")
    check_same_clip("p", prompts, "f" * 64, "the same, renamed", tiny.CLIP)
    with pytest.raises(UserError, match=r"p: .*tiny from x.pt \(ffff\), not .*ViT-B/32 from y.pt"):
        check_same_clip("p", prompts, "0" * 64, "ViT-B/32 from y.pt (0000)", tiny.CLIP)
    other = dataclasses.replace(tiny.CLIP, activation="gelu")  # of the same parameters
    with pytest.raises(UserError, match=r"over a CLIP with activation='quick_gelu'; .* 'gelu'"):
        check_same_clip("p", prompts, "f" * 64, "the same, renamed", other)


def tables(frames, width=2):
    rows = np.random.default_rng(0).normal(size=(frames, width)).astype(np.float32)
    return {
        "prompts": {
            "visual": np.ones((3, 4, width), np.float32),
            "position": np.stack([rows[:, None], 2 * rows[:, None]]),  # [L, F, P, D]
            "frame_position": rows,
            "context": {"transformer": {"frame_position": 3 * rows}},
        }
    }


def test_every_frame_table_and_nothing_else_is_resampled():
    after = interpolate_frames(tables(4), 7)["prompts"]
    assert after["frame_position"].shape == (7, 2)
    assert after["context"]["transformer"]["frame_position"].shape == (7, 2)
    np.testing.assert_array_equal(after["visual"], tables(4)["prompts"]["visual"])
    np.testing.assert_allclose(after["position"][1, :, 0], 2 * after["frame_position"], rtol=1e-6)
    same = tensors.flatten(interpolate_frames(tables(4), 4))
    assert all((same[name] == leaf).all() for name, leaf in tensors.flatten(tables(4)).items())
    assert has_frame_tables(tables(3))
    assert not has_frame_tables({"prompts": {"visual": 1, "context": {"lstm": {"bias": 2}}}})
    assert not has_frame_tables({"clip": {"visual": {"positional_embedding": 1}}})


@settings(max_examples=30)
@given(old=st.integers(1, 20), new=st.integers(1, 40))
def test_resampling_keeps_a_straight_line_and_its_range(old, new):
    line = ((np.arange(old) + 0.5) / old).astype(np.float32)[:, None]
    out = interpolate_frames({"prompts": {"frame_position": line}}, new)["prompts"]
    middles = (np.arange(new) + 0.5) / new  # of segments, as in uniform sampling
    expected = np.clip(middles, line[0], line[-1])
    np.testing.assert_allclose(out["frame_position"][:, 0], expected, atol=1e-6)
