"""Checkpoints of every published kind become the same CLIP; anything else is refused."""

import json
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests import checkpoints, processes
from tests.checkpoints import SIZES
from vop_jax.clip.convert import layouts
from vop_jax.clip.convert.pytorch import convert as convert_any
from vop_jax.clip.weights import load_clip, parameter_shapes, save_clip
from vop_jax.errors import UserError
from vop_jax.storage.tensors import fingerprint, flatten

pytest.importorskip("torch", reason="writes PyTorch files")

ROOT = Path(__file__).parents[3]
STATE = checkpoints.openai_state(SIZES)
HUGGING_FACE = checkpoints.hugging_face_state(STATE)
RELEASED = checkpoints.released_state(STATE, 3, 5)
CAUSAL = np.triu(np.full((19, 19), -np.inf, np.float32), 1)
OTHER = {name: np.zeros_like(tensor) for name, tensor in STATE.items()}  # than the weights


def convert(path, **flags):
    return convert_any(path, **{"vision_heads": 2, "text_heads": 1, **flags})


def save_safetensors(path, state):
    safetensors_numpy.save_file(state, path)
    return path


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def tensors(state):
    import torch

    return {k: torch.from_numpy(np.array(v)) for k, v in state.items()}


def save_shards(path, state, **changes):
    """Two shards and their index; `changes` of its weight map."""
    owner = {}
    for i, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_safetensors(path.parent / shard, {name: state[name] for name in names})
        owner |= dict.fromkeys(names, shard)
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": owner | changes}))
    return path


def half(state):
    return {k: v.astype(np.float16) for k, v in state.items()}


FORMATS = {
    "archive.pt": lambda p: checkpoints.save_torchscript(p, STATE, SIZES),
    "state_dict.pt": lambda p: checkpoints.save_torch(p, STATE),
    "half.pth": lambda p: checkpoints.save_torch(p, half(STATE)),
    "sizes.pt": lambda p: checkpoints.save_torch(
        p, {**STATE, "input_resolution": np.array(24), "attn_mask": np.maximum(CAUSAL, -65504)}
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
    "prefixes.pt": lambda p: checkpoints.save_torch(
        p, prefixed("_orig_mod.module.model.clip.", STATE), "model", "state_dict"
    ),
    "compiled.safetensors": lambda p: save_safetensors(
        p, {k.replace("visual.", "visual._orig_mod."): v for k, v in STATE.items()}
    ),
    "deepspeed.pt": lambda p: checkpoints.save_torch(
        p, STATE, "module", optimizer={"lr": 0.1}, ds_config={"zero": {}}
    ),
    "averaged.pt": lambda p: checkpoints.save_torch(p, STATE, "model", model_ema=tensors(OTHER)),
    "averaged.safetensors": lambda p: save_safetensors(
        p,
        prefixed("module.model.", STATE)
        | prefixed("module.model_ema.module.", OTHER)
        | {"module.model_ema.n_averaged": np.array(3)},  # as PyTorch's AveragedModel
    ),
    "averages.pt": lambda p: checkpoints.save_torch(
        p, STATE, "model", swa=tensors(OTHER), EMA_weights=tensors(OTHER), averaged_model={}
    ),
    "count.pt": lambda p: checkpoints.save_torch(
        p, prefixed("module.", STATE) | {"n_averaged": np.array(3)}
    ),
    "model.safetensors.index.json": lambda p: save_shards(p, HUGGING_FACE),
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


LAYOUTS = pytest.mark.parametrize(
    ("layout", "state"),
    [(layouts.OPENAI, STATE), (layouts.HUGGING_FACE, HUGGING_FACE)],
    ids=["openai", "hugging_face"],
)


@LAYOUTS
def test_the_rules_read_backwards(layout, state):
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


@pytest.mark.parametrize("name", ["averaged.pt", "averaged.safetensors"])
def test_an_average_is_taken_when_it_is_asked_for(name, tmp_path):
    path = FORMATS[name](tmp_path / name)
    assert any("model_ema" in note and "--ema" in note for note in convert(path).notes)
    asked = convert(path, ema=True)
    assert not any("--ema" in note for note in asked.notes)
    assert not any(leaf.any() for leaf in flatten(asked.params).values())


@pytest.mark.parametrize(
    ("save", "flags", "named"),
    [
        (FORMATS["state_dict.pt"], {"ema": True}, "--ema: .*x.pt holds no average"),
        (FORMATS["averages.pt"], {"ema": True}, "swa, EMA_weights, averaged_model; save one"),
        (
            lambda p: checkpoints.save_torch(p, STATE, "ema", step=1),
            {},
            "holds ema, step; the weights must be under .*--ema ema",
        ),
        (lambda p: checkpoints.save_torch(p, STATE, "net"), {}, "holds net; the weights must"),
        (
            lambda p: checkpoints.save_torch(p, STATE, "model", module=tensors(STATE)),
            {},
            "holds model, module; the weights must",
        ),
        (
            lambda p: checkpoints.save_torch(p, prefixed("module.", STATE) | {"x": np.ones(1)}),
            {},
            r"as in a CLIP with a ViT; the first is named module\.ln_final",
        ),
    ],
)
def test_a_container_that_is_not_clear(save, flags, named, tmp_path):
    with pytest.raises(UserError, match=named):
        convert(save(tmp_path / "x.pt"), **flags)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zzz": "model-00003-of-00002.safetensors"}, "model-00003.*no such file"),
        ({"logit_scale": "../x.safetensors"}, "not a file beside it"),
        ({"zzz": "model-00001-of-00002.safetensors"}, "tensor zzz is only in the index"),
    ],
)
def test_an_index_that_is_wrong(changes, named, tmp_path):
    path = save_shards(tmp_path / "model.safetensors.index.json", HUGGING_FACE, **changes)
    with pytest.raises(UserError, match=named):
        convert(path)
    with pytest.raises(UserError, match=r"is one of 2 shards; give the index"):
        convert(tmp_path / "model-00001-of-00002.safetensors")


def test_the_prompts_lengths_are_those_of_the_configuration(tmp_path):
    path = FORMATS["released.pth"](tmp_path / "r.pth")
    assert convert(path).released is None
    stated = {"tp_prefix_token_num": 4, "tp_suffix_token_num": 1, "num_frames": 8, "seed": 42}
    file = tmp_path / "configuration.json"
    file.write_text(json.dumps({"hyperparam": stated}))
    assert convert(path).released == (4, 1, 8)
    for wrong, named in (
        ({"tp_suffix_token_num": 2}, r"4 \+ 2 text prompts, but .* has 5"),
        ({"vp_token_num": 8}, "vp_token_num=8"),
        ({"input_res": 224}, "input_res=224"),
        ({"pooling_type": "max"}, "pooling_type='max'"),
        ({"tp_prefix_token_num": None}, "tp_prefix_token_num=None"),
        ({"tp_prefix_token_num": float("inf")}, "tp_prefix_token_num=inf"),
        ({"tp_prefix_token_num": -1, "tp_suffix_token_num": 6}, "tp_prefix_token_num=-1"),
        ({"tp_prefix_token_num": 3.5, "tp_suffix_token_num": 1.5}, r"tp_prefix_token_num=3\.5"),
        ({"num_frames": 0}, "num_frames=0: not a whole number of 1"),
        (["[" * 100_000], "not the configuration of a VoP"),
    ):
        nested = isinstance(wrong, list)
        file.write_text(wrong[0] if nested else json.dumps({"hyperparam": stated | wrong}))
        with pytest.raises(UserError, match=rf"configuration\.json: .*{named}"):
            convert(path)


def test_a_vocabulary_of_another_tokenizer_is_refused(tmp_path):
    state = {**STATE, "token_embedding.weight": STATE["token_embedding.weight"][:-1]}
    with pytest.raises(UserError, match="vocabulary of 49,407 tokens"):
        convert(save_safetensors(tmp_path / "a.safetensors", state))


# Tensors that are wrong.


@LAYOUTS
def test_every_missing_tensor_is_named(layout, state):
    for name in state.keys() - {"text_model.embeddings.position_ids"}:
        rest = {k: v for k, v in state.items() if k != name}
        with pytest.raises(UserError, match=rf"here: tensor {re.escape(name)} is missing"):
            layouts.read_sizes("here", rest, layout)
            layouts.to_flax("here", rest, layout, SIZES)


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


@pytest.mark.parametrize(
    ("state", "name", "value"),
    [
        (STATE, "attn_mask", np.zeros_like(CAUSAL)),
        (STATE, "input_resolution", np.array(224)),
        (HUGGING_FACE, "text_model.embeddings.position_ids", np.arange(19)[None, ::-1].copy()),
    ],
)
def test_a_constant_of_another_model_is_named(state, name, value, tmp_path):
    with pytest.raises(UserError, match=rf"tensor {re.escape(name)} is not as in a CLIP"):
        convert(save_safetensors(tmp_path / "a.safetensors", {**state, name: value}))


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
        ({k: None for k in RELEASED if "clip." in k}, r"clip\.logit_scale is missing"),
        (
            {"module.text_prompt_learner.text_prompts": np.zeros((3, 5, 10), np.float32)},
            r"text_prompts has shape \(3, 5, 10\)",
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
    named = "Python objects other" if wrap == "pickle" else r"holds \S+mkdir: Python objects other"
    with pytest.raises(UserError, match=named) as error:
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


def flipped(path):
    FORMATS["state_dict.pt"](path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in a tensor
    path.write_bytes(data)


def of_another_version(path):
    FORMATS["archive.pt"](path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 128  # the version that reading it needs
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
    "zip of another version": of_another_version,
    "flipped bit": flipped,
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
from vop_jax.clip.convert.pytorch import convert
from vop_jax.errors import UserError
from vop_jax.storage.tensors import fingerprint
print(fingerprint(convert({str(safe)!r}, vision_heads=2, text_heads=1).params))
try:
    convert({str(state)!r})
except UserError as error:
    print(error)
"""
    done = processes.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    found, message = done.stdout.splitlines()
    assert found == fingerprint(by_hand())
    assert 'pip install -e ".[convert]"' in message
