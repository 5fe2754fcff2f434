"""A converted CLIP on disk: written, read, and refused when it is not one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests import checkpoints, tiny
from vop_jax.clip.model import Clip
from vop_jax.clip.weights import FORMAT, ClipFile, load_clip, parameter_shapes, save_clip
from vop_jax.config.clip import PRESETS, arch_name
from vop_jax.errors import UserError
from vop_jax.storage import tensors


@pytest.fixture(scope="module")
def clip():
    params = checkpoints.random_params(tiny.CLIP)
    return tensors.unflatten({name: leaf.astype(np.float16) for name, leaf in params.items()})


@pytest.fixture
def path(tmp_path, clip):
    """A converted CLIP."""
    save_clip(tmp_path / "x", clip, tiny.CLIP, source="ViT.pt", source_sha256="ab" * 32)
    return tmp_path / "x"


def edit(path, changes):
    """Overrides tensors (None: removes them) and metadata of a file; the checksum is right."""
    tree, metadata = tensors.load(path)
    texts = {key: value for key, value in changes.items() if isinstance(value, str)}
    flat = {k: v for k, v in (tensors.flatten(tree) | changes).items() if k not in texts}
    kept = {name: leaf for name, leaf in flat.items() if leaf is not None}
    tensors.save(path, tensors.unflatten(kept), metadata | texts)


def test_round_trip_in_float32(path, clip):
    loaded = load_clip(path)
    assert loaded.config == tiny.CLIP and loaded.source == "ViT.pt"
    assert loaded.fingerprint == tensors.fingerprint(clip) == tensors.fingerprint(loaded.params)
    assert {leaf.dtype for leaf in tensors.flatten(loaded.params).values()} == {np.dtype("f4")}
    assert loaded.fingerprint[:12] in loaded.name and "ViT.pt" in loaded.name
    metadata = tensors.read_metadata(path)
    assert json.loads(metadata.pop("config")) == tiny.CLIP.to_dict()
    assert metadata.pop(tensors.CHECKSUM)
    assert all(metadata.pop(f"checksum/{part}") for part in clip)
    assert metadata == {
        "format": FORMAT,
        "arch": "ViT-3x32/8@16px",
        "activation": "quick_gelu",
        "source": "ViT.pt",
        "source_sha256": "ab" * 32,
        "fingerprint": loaded.fingerprint,
    }


def test_the_fingerprint_is_verified(path):
    kernel = load_clip(path, verify=True).params["visual"]["proj"]["kernel"]
    edit(path, {"visual/proj/kernel": kernel * np.float32(1 + 1e-6)})
    assert load_clip(path).params
    wrong = r"x: its tensors have the fingerprint .*, but its metadata states"
    with pytest.raises(UserError, match=wrong):
        load_clip(path, verify=True)
    tree, metadata = tensors.load(path)
    del metadata[tensors.CHECKSUM]  # as in files of older versions
    safetensors_numpy.save_file(tensors.flatten(tree), path, metadata)
    with pytest.raises(UserError, match=wrong):
        load_clip(path)


def test_a_tower_is_read_and_checked_alone(path, clip):
    file, whole = ClipFile(path), load_clip(path)
    assert (file.name, file.config) == (whole.name, whole.config)
    for tower, name in (("text", "text/positional_embedding"), ("visual", "visual/proj/kernel")):
        content = bytearray(path.read_bytes())
        content[content.index(tensors.flatten(whole.params)[name].tobytes())] ^= 1
        damaged = path.with_name(tower)
        damaged.write_bytes(content)
        other = {"text": "visual", "visual": "text"}[tower]
        taken = ClipFile(damaged).take(other)
        assert taken.keys() == {other, "logit_scale"}
        expected = {name: whole.params[name] for name in taken}
        assert tensors.fingerprint(taken) == tensors.fingerprint(expected)
        with pytest.raises(UserError, match=f"{tower}: damaged, the checksum of {tower} is not"):
            ClipFile(damaged).take(tower)


def test_a_file_of_an_older_version_is_read_whole(path, clip):
    edit(path, {})  # without the checksums of the parts
    file = ClipFile(path)
    params = file.take("text") | file.take("visual")
    assert tensors.fingerprint(params) == tensors.fingerprint(clip)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="x: damaged"):
        ClipFile(path)


def test_shapes_are_those_of_a_traced_clip():
    config = dataclasses.replace(tiny.CLIP, text_layers=2, text_mlp=24)
    frames = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    ids = np.zeros((1, config.context_length), np.int32)
    traced = jax.eval_shape(Clip(config).init, jax.random.key(0), frames, ids)["params"]
    expected = {name: leaf.shape for name, leaf in tensors.flatten(traced).items()}
    assert [*parameter_shapes(config).items()] == [*expected.items()]


def sizes(**changes):
    return {"config": json.dumps(tiny.CLIP.to_dict() | changes)}


DAMAGED = "x: its metadata is not a converted CLIP's"


POSITIONS = "text/positional_embedding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual/proj/kernel": None}, "x: tensor visual/proj/kernel is missing"),
        ({"z": np.ones(1)}, r"x: unknown tensor z \(1 in all\)"),
        ({POSITIONS: np.ones((7, 16))}, rf"{POSITIONS} has shape \(7, 16\), expected \(20, 16\)"),
        (sizes(activation="relu"), "activation 'relu' is not one of quick_gelu, gelu"),
        ({"format": "vop_jax.prompts"}, r"x: not a converted CLIP; .*convert_clip_weights.py"),
        ({"config": "{"}, DAMAGED),
        ({"config": '{"image_size": 16}'}, DAMAGED),
        *((sizes(vision_width=wrong), DAMAGED) for wrong in ([32], 32.0, 0)),
    ],
)
def test_wrong_tensors_and_metadata_are_refused(path, change, message):
    edit(path, change)
    for read in (load_clip, ClipFile):
        with pytest.raises(UserError, match=message):
            read(path)


def test_a_tensor_below_another_is_refused(path):
    nested = {"logit_scale": np.zeros(()), "logit_scale/x": np.zeros(2)}
    safetensors_numpy.save_file(nested, path, {"format": FORMAT})
    with pytest.raises(UserError, match="x: a tensor lies below the name of another"):
        load_clip(path)


def test_architectures_have_names():
    for arch, config in PRESETS.items():
        assert (
            arch_name(config) == arch_name(dataclasses.replace(config, activation="gelu")) == arch
        )
    other = dataclasses.replace(PRESETS["ViT-B/32"], vision_layers=13)
    assert arch_name(other) == "ViT-13x768/32@224px"
    assert [c.patches for c in PRESETS.values()] == [49, 196, 256, 576, 16, 16]
