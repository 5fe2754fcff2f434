"""Checkpoints of every published kind become the same CLIP; anything else is refused."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests import checkpoints
from tests.checkpoints import SIZES
from vop_jax.clip import layouts
from vop_jax.clip.convert import convert
from vop_jax.clip.weights import load_clip, parameter_shapes, save_clip
from vop_jax.errors import UserError
from vop_jax.tensorfile import fingerprint, flatten

pytest.importorskip("torch", reason="writes PyTorch files")

ROOT = Path(__file__).parents[2]
STATE = checkpoints.openai_state(SIZES)
HUGGING_FACE = checkpoints.hugging_face_state(STATE)
RELEASED = checkpoints.released_state(STATE, 3, 5)


def save_safetensors(path, state):
    safetensors_numpy.save_file(state, path)
    return path


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def half(state):
    return {k: v.astype(np.float16) for k, v in state.items()}


FORMATS = {
    "archive.pt": lambda p: checkpoints.save_torchscript(p, STATE, SIZES),
    "state_dict.pt": lambda p: checkpoints.save_torch(p, STATE),
    "half.pth": lambda p: checkpoints.save_torch(p, half(STATE)),
    "sizes.pt": lambda p: checkpoints.save_torch(
        p, {**STATE, "input_resolution": np.array(24), "attn_mask": np.zeros((19, 19))}
    ),
    "nested.pt": lambda p: checkpoints.save_torch(
        p, prefixed("module.", STATE), "state_dict", epoch=3, name="run", optimizer={"lr": 0.1}
    ),
    "custom_text.pt": lambda p: checkpoints.save_torch(p, checkpoints.custom_text_state(STATE)),
    "custom_text.safetensors": lambda p: save_safetensors(p, checkpoints.custom_text_state(STATE)),
    "open_clip.safetensors": lambda p: save_safetensors(p, STATE),
    "scale.safetensors": lambda p: save_safetensors(
        p, {**STATE, "logit_scale": STATE["logit_scale"].reshape(1)}
    ),
    "hugging_face.bin": lambda p: checkpoints.save_torch(p, HUGGING_FACE),
    "hugging_face.safetensors": lambda p: save_safetensors(p, HUGGING_FACE),
    "released.pth": lambda p: checkpoints.save_torch(p, RELEASED, "state_dict"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_clip(name, tmp_path):
    converted = convert(FORMATS[name](tmp_path / name))
    assert converted.config == SIZES
    assert fingerprint(converted.params) == fingerprint(by_hand())
    assert {k: v.shape for k, v in flatten(converted.params).items()} == parameter_shapes(SIZES)
    assert {v.dtype for v in flatten(converted.params).values()} == {np.dtype(np.float32)}
    assert (converted.prompts is not None) == (name == "released.pth")


def by_hand():
    """Our tree of STATE, by index arithmetic instead of rules: y = W x as sums over inputs."""
    tree = {name: np.empty(shape, np.float32) for name, shape in parameter_shapes(SIZES).items()}
    tree["logit_scale"] = STATE["logit_scale"]
    tree["visual/class_embedding"] = STATE["visual.class_embedding"]
    tree["visual/positional_embedding"] = STATE["visual.positional_embedding"]
    tree["visual/conv1/kernel"] = np.einsum("dchw->hwcd", STATE["visual.conv1.weight"])
    tree["visual/proj/kernel"] = STATE["visual.proj"]
    tree["text/positional_embedding"] = STATE["positional_embedding"]
    tree["text/token_embedding/embedding"] = STATE["token_embedding.weight"]
    tree["text/text_projection/kernel"] = STATE["text_projection"]
    norms = {"visual/ln_pre": "visual.ln_pre", "visual/ln_post": "visual.ln_post"}
    norms["text/ln_final"] = "ln_final"
    towers = (
        ("visual", "visual.transformer", SIZES.vision_layers, SIZES.vision_heads),
        ("text", "transformer", SIZES.text_layers, SIZES.text_heads),
    )
    for tower, prefix, layers, heads in towers:
        for i in range(layers):
            ours, theirs = f"{tower}/transformer/resblocks.{i}", f"{prefix}.resblocks.{i}"
            norms |= {f"{ours}/{n}": f"{theirs}.{n}" for n in ("ln_1", "ln_2")}
            weight, bias = (STATE[f"{theirs}.attn.in_proj_{k}"] for k in ("weight", "bias"))
            width = weight.shape[1]
            size = width // heads
            for j, part in enumerate(("query", "key", "value")):
                for head in range(heads):
                    rows = slice(j * width + head * size, j * width + (head + 1) * size)
                    tree[f"{ours}/attn/{part}/kernel"][:, head] = weight[rows].T
                    tree[f"{ours}/attn/{part}/bias"][head] = bias[rows]
            out = STATE[f"{theirs}.attn.out_proj.weight"]
            for head in range(heads):
                columns = out[:, head * size : (head + 1) * size]
                tree[f"{ours}/attn/out/kernel"][head] = columns.T
            tree[f"{ours}/attn/out/bias"] = STATE[f"{theirs}.attn.out_proj.bias"]
            for layer in ("c_fc", "c_proj"):
                tree[f"{ours}/mlp/{layer}/kernel"] = STATE[f"{theirs}.mlp.{layer}.weight"].T
                tree[f"{ours}/mlp/{layer}/bias"] = STATE[f"{theirs}.mlp.{layer}.bias"]
    for ours, theirs in norms.items():
        tree[f"{ours}/scale"] = STATE[f"{theirs}.weight"]
        tree[f"{ours}/bias"] = STATE[f"{theirs}.bias"]
    return tree


@pytest.mark.parametrize("layout", [layouts.OPENAI, layouts.HUGGING_FACE], ids=lambda x: x.name)
def test_the_rules_read_backwards(layout):
    state = STATE if layout is layouts.OPENAI else HUGGING_FACE
    state = {name: tensor for name, tensor in state.items() if "position_ids" not in name}
    tree = layouts.to_flax("here", {**state}, layout, SIZES)
    back = layouts.from_flax(tree, layout, SIZES)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_saved_and_loaded_again(tmp_path):
    converted = convert(save_safetensors(tmp_path / "a.safetensors", STATE))
    path = tmp_path / "clip.safetensors"
    save_clip(path, converted.params, converted.config, source="a", source_sha256=converted.sha256)
    assert load_clip(path).fingerprint == fingerprint(by_hand())
    assert load_clip(path).config == SIZES


def test_released_prompts(tmp_path):
    prompts = convert(FORMATS["released.pth"](tmp_path / "r.pth")).prompts
    visual = RELEASED["module.visual_prompt_learner.visual_prompts"]
    np.testing.assert_array_equal(prompts["visual"], visual[:, 0])
    text = RELEASED["module.text_prompt_learner.text_prompts"]
    np.testing.assert_array_equal(prompts["text"], text)


def test_bfloat16_is_read(tmp_path):
    state = {k: v.astype(ml_dtypes.bfloat16) for k, v in STATE.items()}
    converted = convert(save_safetensors(tmp_path / "b.safetensors", state))
    embedding = converted.params["text"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(embedding, state["token_embedding.weight"].astype(np.float32))


# What a checkpoint tells beside its tensors.


def write_config(folder, name, **values):
    (folder / name).write_text(json.dumps(values))


def hugging_face_config(folder, act="gelu", heads=4, **more):
    tower = {"hidden_act": act, "num_attention_heads": heads, **more}
    write_config(folder, "config.json", vision_config=tower, text_config=tower)


def open_clip_config(folder, **more):
    vision, text = {"width": 128, "head_width": 32}, {"width": 40, "heads": 5}
    write_config(
        folder, "open_clip_config.json", model_cfg={"vision_cfg": vision, "text_cfg": text, **more}
    )


def test_hugging_face_config_tells_activation_and_heads(tmp_path):
    hugging_face_config(tmp_path)
    open_clip_config(tmp_path, quick_gelu=True)  # of another file in the folder
    converted = convert(save_safetensors(tmp_path / "model.safetensors", HUGGING_FACE))
    config = converted.config
    assert (config.activation, config.vision_heads, config.text_heads) == ("gelu", 4, 4)
    assert converted.assumed == ()


@pytest.mark.parametrize(
    ("given", "activation"), [({}, "gelu"), ({"quick_gelu": True}, "quick_gelu")]
)
def test_open_clip_config_tells_activation_and_heads(given, activation, tmp_path):
    open_clip_config(tmp_path, **given)
    hugging_face_config(tmp_path, heads=2)
    config = convert(save_safetensors(tmp_path / "open_clip.safetensors", STATE)).config
    assert (config.activation, config.vision_heads, config.text_heads) == (activation, 4, 5)


def test_untold_activation_is_assumed_aloud(tmp_path):
    path = save_safetensors(tmp_path / "a.safetensors", STATE)
    [sentence] = convert(path).assumed
    assert "quick_gelu" in sentence and "--activation" in sentence
    asked = convert(path, activation="gelu")
    assert asked.config.activation == "gelu" and asked.assumed == ()


def test_archives_are_known_to_be_quick_gelu(tmp_path):
    path = FORMATS["archive.pt"](tmp_path / "a.pt")
    assert convert(path).assumed == ()
    with pytest.raises(UserError, match="--activation=gelu contradicts"):
        convert(path, activation="gelu")


def test_contradicting_the_config_is_refused(tmp_path):
    open_clip_config(tmp_path, quick_gelu=True)
    path = save_safetensors(tmp_path / "a.safetensors", STATE)
    for flags in ({"activation": "gelu"}, {"vision_heads": 2}, {"text_heads": 1}):
        with pytest.raises(UserError, match=r"contradicts .*open_clip_config\.json"):
            convert(path, **flags)
    assert convert(path, vision_heads=4).config.vision_heads == 4


def test_heads_that_do_not_divide_the_width(tmp_path):
    path = save_safetensors(tmp_path / "a.safetensors", STATE)
    with pytest.raises(UserError, match="--vision-heads"):
        convert(path, vision_heads=3)
    assert convert(path, text_heads=5).config.text_heads == 5


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"act": "gelu_new"}, "gelu_new"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ],
)
def test_a_config_of_another_model_is_refused(values, named, tmp_path):
    hugging_face_config(tmp_path, **values)
    with pytest.raises(UserError, match=named):
        convert(save_safetensors(tmp_path / "model.safetensors", HUGGING_FACE))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"vision_config": 3}',
    ],
)
def test_a_broken_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        convert(save_safetensors(tmp_path / "model.safetensors", HUGGING_FACE))


@pytest.mark.parametrize("heads", ["4", 4.0, True, [4]])
def test_heads_that_are_no_number(heads, tmp_path):
    hugging_face_config(tmp_path, heads=heads)
    with pytest.raises(UserError, match="cannot be parted into"):
        convert(save_safetensors(tmp_path / "model.safetensors", HUGGING_FACE))


def test_a_head_width_of_nothing(tmp_path):
    open_clip_config(tmp_path, vision_cfg={"head_width": 0}, text_cfg={})
    with pytest.raises(UserError, match=r"open_clip_config\.json: not a readable config"):
        convert(save_safetensors(tmp_path / "model.safetensors", STATE))


# Tensors that are wrong.


@pytest.mark.parametrize("name", sorted(STATE))
def test_a_missing_tensor_is_named(name, tmp_path):
    state = {k: v for k, v in STATE.items() if k != name}
    with pytest.raises(UserError, match=rf"tensor {re.escape(name)} is missing"):
        convert(save_safetensors(tmp_path / "a.safetensors", state))


@pytest.mark.parametrize(
    "name", sorted(HUGGING_FACE.keys() - {"text_model.embeddings.position_ids"})
)
def test_a_missing_hugging_face_tensor_is_named(name, tmp_path):
    state = {k: v for k, v in HUGGING_FACE.items() if k != name}
    with pytest.raises(UserError, match=rf"tensor {re.escape(name)} is missing"):
        convert(save_safetensors(tmp_path / "a.safetensors", state))


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "visual.conv1.weight",
        "visual.class_embedding",
        "visual.positional_embedding",
        "transformer.resblocks.1.attn.in_proj_weight",
        "transformer.resblocks.1.mlp.c_proj.weight",
        "text_projection",
    ],
)
def test_a_misshapen_tensor_is_named(name, tmp_path):
    state = {**STATE, name: np.zeros((*STATE[name].shape, 2), np.float32)}
    with pytest.raises(UserError, match=rf"tensor {re.escape(name)} has shape"):
        convert(save_safetensors(tmp_path / "a.safetensors", state))


def test_a_transposed_tensor_is_named(tmp_path):
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    state = {**STATE, name: np.array(STATE[name].T, order="C")}
    with pytest.raises(UserError, match=rf"tensor {name} has shape \(128, 512\)"):
        convert(save_safetensors(tmp_path / "a.safetensors", state))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3])
def test_numbers_that_are_none_are_named(bad, tmp_path):
    values = np.full_like(STATE["visual.proj"], bad, dtype=np.array(bad).dtype)
    state = {**STATE, "visual.proj": values}
    with pytest.raises(UserError, match=r"tensor visual\.proj does not hold finite"):
        convert(save_safetensors(tmp_path / "a.safetensors", state))


@pytest.mark.parametrize("state", [STATE, HUGGING_FACE], ids=["openai", "hugging_face"])
def test_an_unexpected_tensor_is_named(state, tmp_path):
    state = {**state, "logit_bias": np.zeros((), np.float32)}
    with pytest.raises(UserError, match=r"unexpected tensor logit_bias \(1 in all\)"):
        convert(save_safetensors(tmp_path / "a.safetensors", state))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"module.image_encoder.proj": STATE["visual.proj"] + 1}, "image_encoder.proj differs"),
        ({"module.head.weight": STATE["visual.proj"]}, "unexpected tensor head.weight"),
        ({"module.text_prompt_learner.text_prompts": None}, "text_prompts is missing"),
        (
            {"module.text_prompt_learner.text_prompts": np.zeros((3, 5, 40), np.float32)},
            r"text_prompts has shape \(3, 5, 40\)",
        ),
        (
            {"module.visual_prompt_learner.visual_prompts": np.zeros((3, 3, 128), np.float32)},
            "visual_prompts has shape",
        ),
    ],
)
def test_a_released_checkpoint_that_is_not_one(change, named, tmp_path):
    state = {k: v for k, v in {**RELEASED, **change}.items() if v is not None}
    with pytest.raises(UserError, match=named):
        convert(checkpoints.save_torch(tmp_path / "r.pth", state, "state_dict"))


# Files that are none.


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", ["pickle", "torch", "beside"])
def test_objects_in_a_pickle_are_refused_and_never_run(wrap, tmp_path):
    import torch

    path, target = tmp_path / "bad.pt", tmp_path / "bomb"
    bomb = {"state_dict": {"visual.proj": Bomb(target)}}
    if wrap == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif wrap == "torch":
        torch.save(bomb, path)
    else:
        state = {k: torch.from_numpy(np.array(v)) for k, v in STATE.items()}
        torch.save({"state_dict": state, "config": Bomb(target)}, path)
    with pytest.raises(UserError, match="Python objects other than tensors") as error:
        convert(path)
    assert "\n" not in str(error.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb would have worked"


def truncated(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no tensors")


def unlisted(path):
    FORMATS["state_dict.pt"](path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02")] = 0  # the first entry of its directory
    path.write_bytes(data)


def save_odd(path, make):
    torch = pytest.importorskip("torch")
    torch.save({"a": make(torch)}, path)


def float8(path):
    """Of a kind that numpy has no name for."""
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")


WRONG = {
    "empty": lambda p: p.write_bytes(b""),
    "page": lambda p: p.write_text("<!DOCTYPE html><html>Not found</html>"),
    "pointer": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "directory": lambda p: p.mkdir(),
    "missing": lambda p: None,
    "truncated archive": lambda p: truncated(p, FORMATS["archive.pt"]),
    "truncated state": lambda p: truncated(p, FORMATS["state_dict.pt"]),
    "truncated safetensors": lambda p: truncated(p, FORMATS["open_clip.safetensors"]),
    "zip": zipped,
    "zip without its directory": unlisted,
    "sparse": lambda p: save_odd(p, lambda torch: torch.eye(2).to_sparse()),
    "nowhere": lambda p: save_odd(p, lambda torch: torch.ones(2, device="meta")),
    "float8": float8,
    "list": lambda p: p.write_bytes(pickle.dumps([1, 2], protocol=2)),
    "no tensor": lambda p: checkpoints.save_torch(p, STATE, "epoch"),
    "another model": lambda p: checkpoints.save_torch(p, {"fc.weight": np.zeros((2, 2))}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_line_that_names_it(kind, tmp_path):
    path = tmp_path / "source.pt"
    WRONG[kind](path)
    with pytest.raises(UserError, match=r"source\.pt") as error:
        convert(path)
    assert "\n" not in str(error.value)


def test_safetensors_need_no_torch(tmp_path):
    safe = save_safetensors(tmp_path / "a.safetensors", STATE)
    state = FORMATS["state_dict.pt"](tmp_path / "a.pt")
    code = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from vop_jax.clip.convert import convert
from vop_jax.errors import UserError
from vop_jax.tensorfile import fingerprint
print(fingerprint(convert({str(safe)!r}).params))
try:
    convert({str(state)!r})
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found, message = done.stdout.splitlines()
    assert found == fingerprint(by_hand())
    assert 'pip install -e ".[convert]"' in message
