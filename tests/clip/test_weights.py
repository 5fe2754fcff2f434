import dataclasses
import json

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests import tiny
from vop_jax.clip.weights import FORMAT, load_clip, parameter_shapes, save_clip
from vop_jax.config.clip import PRESETS, arch_name
from vop_jax.errors import UserError
from vop_jax.storage import tensors


def random_clip(seed=0):
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(tiny.CLIP)
    return tensors.unflatten(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    )


def save(path, params, config=tiny.CLIP):
    return save_clip(path, params, config, source="ViT.pt", source_sha256="ab" * 32)


def edited(path, change=lambda flat: None, **metadata):
    """Saves a good file with its tensors changed in place and its metadata overridden."""
    save(path, random_clip())
    tree, described = tensors.load(path)
    flat = tensors.flatten(tree)
    change(flat)
    tensors.save(path, tensors.unflatten(flat), described | metadata)
    return path


def test_round_trip(tmp_path):
    path, params = tmp_path / "clip.safetensors", random_clip()
    fingerprint = save(path, params)
    clip = load_clip(path)
    assert clip.config == tiny.CLIP and clip.source == "ViT.pt"
    assert clip.fingerprint == fingerprint == tensors.fingerprint(clip.params)
    saved, loaded = tensors.flatten(params), tensors.flatten(clip.params)
    assert saved.keys() == loaded.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name], loaded[name])
    assert fingerprint[:12] in clip.name and "ViT.pt" in clip.name


def test_weights_are_held_in_float32(tmp_path):
    half = {k: v.astype(np.float16) for k, v in tensors.flatten(random_clip()).items()}
    save(tmp_path / "x", tensors.unflatten(half))
    loaded = tensors.flatten(load_clip(tmp_path / "x").params)
    assert {leaf.dtype for leaf in loaded.values()} == {np.dtype(np.float32)}


def test_the_file_says_what_it_is(tmp_path):
    fingerprint = save(tmp_path / "x", random_clip())
    metadata = tensors.read_metadata(tmp_path / "x")
    assert metadata.pop("config") and metadata.pop(tensors.CHECKSUM)
    assert metadata == {
        "format": FORMAT,
        "arch": "ViT-3x32/8@16px",
        "activation": "quick_gelu",
        "source": "ViT.pt",
        "source_sha256": "ab" * 32,
        "fingerprint": fingerprint,
    }


def test_the_fingerprint_is_that_of_the_tensors(tmp_path):
    def change(flat):
        flat["visual/proj/kernel"][0, 0] += 1e-6

    path = edited(tmp_path / "x", change)  # with a checksum of its own
    assert load_clip(path).params
    with pytest.raises(UserError, match=r"x: its tensors have the fingerprint .*, but"):
        load_clip(path, verify=True)
    tree, metadata = tensors.load(path)
    del metadata[tensors.CHECKSUM]  # as in files that older versions wrote
    safetensors_numpy.save_file(tensors.flatten(tree), path, metadata)
    with pytest.raises(UserError, match=r"x: its tensors have the fingerprint"):
        load_clip(path)
    save(path, random_clip())
    assert load_clip(path, verify=True).fingerprint == tensors.fingerprint(random_clip())


def test_a_missing_tensor_is_named(tmp_path):
    path = edited(tmp_path / "x", lambda flat: flat.pop("visual/proj/kernel"))
    with pytest.raises(UserError, match=r"x: tensor visual/proj/kernel is missing"):
        load_clip(path)


def test_an_unknown_tensor_is_named(tmp_path):
    path = edited(tmp_path / "x", lambda flat: flat.update(zzz=np.zeros(1, np.float32)))
    with pytest.raises(UserError, match=r"x: unknown tensor zzz \(1 in all\)"):
        load_clip(path)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    def shorten(flat):
        flat["text/positional_embedding"] = flat["text/positional_embedding"][:7]

    path = edited(tmp_path / "x", shorten)
    message = r"text/positional_embedding has shape \(7, 16\), expected \(20, 16\)"
    with pytest.raises(UserError, match=message):
        load_clip(path)


def test_an_unknown_activation_is_refused(tmp_path):
    sizes = tiny.CLIP.to_dict() | {"activation": "relu"}
    path = edited(tmp_path / "x", activation="relu", config=json.dumps(sizes))
    with pytest.raises(UserError, match="activation 'relu' is not one of quick_gelu, gelu"):
        load_clip(path)


@pytest.mark.parametrize("metadata", [{}, {"format": "vop_jax.prompts"}])
def test_another_safetensors_file_is_refused(tmp_path, metadata):
    tensors.save(tmp_path / "x", {"a": np.zeros(2)}, metadata)
    with pytest.raises(UserError, match=r"x: not a converted CLIP; .*convert_clip_weights.py"):
        load_clip(tmp_path / "x")


def sizes(**changes):
    return {"config": json.dumps(tiny.CLIP.to_dict() | changes)}


@pytest.mark.parametrize(
    "damage",
    [
        {"config": "{"},
        {"config": '{"image_size": 16}'},
        sizes(vision_width=[32]),
        sizes(vision_width=32.0),
        sizes(patch_size=0),
        sizes(vision_heads=0),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, damage):
    with pytest.raises(UserError, match="x: its metadata is not a converted CLIP's"):
        load_clip(edited(tmp_path / "x", **damage))


def test_a_tensor_below_another_is_refused(tmp_path):
    safetensors_numpy.save_file(
        {"logit_scale": np.zeros(()), "logit_scale/x": np.zeros(2)},
        tmp_path / "x",
        {"format": "vop_jax.clip"},
    )
    with pytest.raises(UserError, match="x: a tensor lies below the name of another"):
        load_clip(tmp_path / "x")


def test_a_truncated_file_is_refused(tmp_path):
    save(tmp_path / "x", random_clip())
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="x: not a readable safetensors file"):
        load_clip(tmp_path / "x")


def test_a_released_pytorch_file_is_refused(tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(UserError, match=r"ViT-B-32.pt: not a"):
        load_clip(tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("arch", PRESETS)
def test_presets_have_names(arch):
    config = PRESETS[arch]
    assert arch_name(config) == arch
    assert arch_name(dataclasses.replace(config, activation="gelu")) == arch


def test_other_sizes_have_a_descriptive_name():
    other = dataclasses.replace(PRESETS["ViT-B/32"], vision_layers=13)
    assert arch_name(other) == "ViT-13x768/32@224px"


@pytest.mark.parametrize(
    ("arch", "parameters"), [("ViT-B/32", 151_277_313), ("ViT-L/14", 427_616_513)]
)
def test_sizes_are_openais(arch, parameters):
    assert sum(int(np.prod(s)) for s in parameter_shapes(PRESETS[arch]).values()) == parameters


def test_patches():
    assert [c.patches for c in PRESETS.values()] == [49, 196, 256, 576, 16, 16]
