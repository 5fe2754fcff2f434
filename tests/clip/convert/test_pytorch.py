"""Checkpoints of every published kind become the same CLIP; anything else is refused."""

import json
import os
import pickle
import re
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import checkpoints
from tests.checkpoints import SIZES, save_torch
from vop_jax.clip.convert import layouts, vop_checkpoint
from vop_jax.clip.convert.pytorch import convert as convert_any
from vop_jax.errors import UserError
from vop_jax.storage.tensors import fingerprint, flatten

torch = pytest.importorskip("torch", reason="writes PyTorch files")

PARAMS = checkpoints.random_params(SIZES)
EXPECTED = fingerprint(PARAMS)
STATE = checkpoints.openai_state(PARAMS)
# Parity tests prove that these are transformers' names.
HUGGING_FACE = layouts.from_flax(PARAMS, layouts.HUGGING_FACE, SIZES)
HUGGING_FACE["text_model.embeddings.position_ids"] = np.arange(SIZES.context_length)[None]
PROMPTS = checkpoints.random_prompts(SIZES, 3, 5)
RELEASED = checkpoints.released_state(STATE, PROMPTS)
CAUSAL = np.triu(np.full((19, 19), -np.inf, np.float32), 1)
OTHER = {name: np.zeros_like(tensor) for name, tensor in STATE.items()}  # no weights of STATE


def convert(path, **flags):
    return convert_any(path, **{"vision_heads": 2, "text_heads": 1, **flags})


def save_safetensors(path, state):
    save_file(state, path)
    return path


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def tensors(state):
    return {k: torch.from_numpy(np.array(v)) for k, v in state.items()}


def save_shards(path, state, **changes):
    """Two shards and their index; `changes` of its weight map."""
    shards = {}
    for i, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, path.parent / shard)
        shards |= dict.fromkeys(names, shard)
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards | changes}))
    return path


CONSTANTS = {
    "input_resolution": np.array(24),
    "attn_mask": np.maximum(CAUSAL, -65504),
    "logit_scale": STATE["logit_scale"].reshape(1),
}
COMPILED = {k.replace("visual.", "visual._orig_mod."): v for k, v in STATE.items()}
WRAPPED = prefixed("_orig_mod.module.model.clip.", COMPILED) | {"n_averaged": np.array(3)}
FORMATS = {
    "archive.pt": lambda p: checkpoints.save_torchscript(p, STATE, SIZES),
    "state_dict.pt": lambda p: save_torch(p, STATE),
    "constants.pt": lambda p: save_torch(p, STATE | CONSTANTS),
    "custom_text.pt": lambda p: save_torch(  # open_clip's CustomTextCLIP
        p, {k if k[:4] in ("visu", "logi") else f"text.{k}": v for k, v in STATE.items()}
    ),
    "bfloat16.safetensors": lambda p: save_safetensors(
        p, {k: v.astype(ml_dtypes.bfloat16) for k, v in STATE.items()}
    ),
    "wrapped.pt": lambda p: save_torch(p, WRAPPED, "model", "state_dict"),
    "deepspeed.pt": lambda p: save_torch(p, STATE, "module", optimizer={"lr": 0.1}, epoch=3),
    "averaged.pt": lambda p: save_torch(p, STATE, "model", model_ema=tensors(OTHER)),
    "averaged.safetensors": lambda p: save_safetensors(
        p,
        prefixed("module.model.", STATE)
        | prefixed("module.model_ema.module.", OTHER)
        | {"module.model_ema.n_averaged": np.array(3)},  # as PyTorch's AveragedModel
    ),
    "averages.pt": lambda p: save_torch(
        p, STATE, "model", swa=tensors(OTHER), EMA_weights=tensors(OTHER), averaged_model={}
    ),
    "model.safetensors.index.json": lambda p: save_shards(p, HUGGING_FACE),
    "released.pth": lambda p: save_torch(p, RELEASED, "state_dict"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_clip(name, tmp_path):
    converted = convert(FORMATS[name](tmp_path / name))
    assert converted.config == SIZES
    assert fingerprint(converted.params) == EXPECTED
    assert {leaf.dtype for leaf in flatten(converted.params).values()} == {np.dtype("f4")}
    prompts = None if converted.prompts is None else fingerprint(converted.prompts)
    assert prompts == (fingerprint(PROMPTS) if name == "released.pth" else None)


def test_the_rules_read_backwards():
    assert fingerprint(layouts.from_flax(PARAMS, layouts.OPENAI, SIZES)) == fingerprint(STATE)


@pytest.mark.parametrize("name", ["averaged.pt", "averaged.safetensors"])
def test_an_average_is_taken_with_the_flag(name, tmp_path):
    path = FORMATS[name](tmp_path / name)
    assert any("model_ema" in note and "--ema" in note for note in convert(path).notes)
    average = convert(path, ema=True)
    assert not any("--ema" in note for note in average.notes)
    assert not any(leaf.any() for leaf in flatten(average.params).values())


@pytest.mark.parametrize(
    ("save", "flags", "message"),
    [
        (FORMATS["state_dict.pt"], {"ema": True}, "--ema: .*x.pt holds no average"),
        (FORMATS["averages.pt"], {"ema": True}, "swa, EMA_weights, averaged_model; save one"),
        (
            lambda p: save_torch(p, STATE, "ema", step=1),
            {},
            "holds ema, step; the weights must be under .*--ema ema",
        ),
        (
            lambda p: save_torch(p, STATE, "model", module=tensors(STATE)),
            {},
            "holds model, module; the weights must",
        ),
        (
            lambda p: save_torch(p, prefixed("module.", STATE) | {"x": np.ones(1)}),
            {},
            r"as in a CLIP with a ViT; the first is named module\.ln_final",
        ),
    ],
)
def test_an_ambiguous_container_is_refused(save, flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert(save(tmp_path / "x.pt"), **flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zzz": "model-00003-of-00002.safetensors"}, "model-00003.*no such file"),
        ({"logit_scale": "../x.safetensors"}, "not a file beside it"),
        ({"zzz": "model-00001-of-00002.safetensors"}, "tensor zzz is only in the index"),
    ],
)
def test_a_wrong_index_is_refused(changes, message, tmp_path):
    path = save_shards(tmp_path / "model.safetensors.index.json", HUGGING_FACE, **changes)
    with pytest.raises(UserError, match=message):
        convert(path)
    with pytest.raises(UserError, match=r"is one of 2 shards; give the index"):
        convert(tmp_path / "model-00001-of-00002.safetensors")


def test_a_released_config_states_the_prompt_lengths(tmp_path):
    path = FORMATS["released.pth"](tmp_path / "r.pth")
    assert convert(path).released is None
    stated = {"tp_prefix_token_num": 4, "tp_suffix_token_num": 1, "num_frames": 8, "seed": 42}
    file = tmp_path / "configuration.json"
    file.write_text(json.dumps({"hyperparam": stated}))
    released = convert(path)
    assert released.released == (4, 1, 8)
    prompts, config = released.prompts, released.config
    for wrong, message in (
        ({"tp_suffix_token_num": 2}, r"4 \+ 2 text prompts, but .* has 5"),
        ({"vp_token_num": 8}, "vp_token_num=8"),
        ({"input_res": 224}, "input_res=224"),
        ({"pooling_type": "max"}, "pooling_type='max'"),
        ({"tp_prefix_token_num": None}, "tp_prefix_token_num=None"),
        ({"tp_prefix_token_num": float("inf")}, "tp_prefix_token_num=inf"),
        ({"tp_prefix_token_num": -1, "tp_suffix_token_num": 6}, "tp_prefix_token_num=-1"),
        ({"tp_prefix_token_num": 3.5, "tp_suffix_token_num": 1.5}, r"tp_prefix_token_num=3\.5"),
        ({"num_frames": 0}, "num_frames=0: not a whole number of 1"),
        ("[" * 100_000, "not the configuration of a VoP"),
    ):
        text = wrong if isinstance(wrong, str) else json.dumps({"hyperparam": stated | wrong})
        file.write_text(text)
        with pytest.raises(UserError, match=rf"configuration\.json: .*{message}"):
            vop_checkpoint.read_config(path, prompts, config)


# Wrong tensors.


@pytest.mark.parametrize(
    ("layout", "state"), [(layouts.OPENAI, STATE), (layouts.HUGGING_FACE, HUGGING_FACE)]
)
def test_every_missing_tensor_is_named(layout, state):
    for name in state.keys() - {"text_model.embeddings.position_ids"}:
        rest = {k: v for k, v in state.items() if k != name}
        with pytest.raises(UserError, match=rf"here: tensor {re.escape(name)} is missing"):
            layouts.read_sizes("here", rest, layout)
            layouts.to_flax("here", rest, layout, SIZES)


C_FC = "visual.transformer.resblocks.0.mlp.c_fc.weight"
TEXT_PROMPTS = "module.text_prompt_learner.text_prompts"
VISUAL_PROMPTS = "module.visual_prompt_learner.visual_prompts"
BACKWARDS = np.arange(19)[None, ::-1].copy()


@pytest.mark.parametrize(
    ("state", "changes", "message"),
    [
        *(
            (STATE, {name: STATE[name][..., None].repeat(2, -1)}, rf"tensor {name} has shape")
            for name in ("logit_scale", "visual.conv1.weight", "visual.positional_embedding")
        ),
        (STATE, {"ln_final.weight": np.ones((), "f4")}, r"ln_final.weight has shape \(\), which"),
        (STATE, {C_FC: STATE[C_FC].T}, rf"tensor {C_FC} has shape \(128, 512\)"),
        (STATE, {"attn_mask": np.zeros_like(CAUSAL)}, "tensor attn_mask is not as in a CLIP"),
        (STATE, {"input_resolution": np.array(224)}, "tensor input_resolution is not as in a CLIP"),
        (
            HUGGING_FACE,
            {"text_model.embeddings.position_ids": BACKWARDS},
            "tensor text_model.embeddings.position_ids is not as in a CLIP",
        ),
        *(
            (STATE, {"visual.proj": STATE["visual.proj"] + bad}, "finite real numbers")
            for bad in (np.nan, np.inf)
        ),
        (STATE, {"visual.proj": STATE["visual.proj"].astype(int)}, "finite real numbers"),
        (STATE, {"logit_bias": np.zeros(1)}, r"unexpected tensor logit_bias \(1 in all\)"),
        (HUGGING_FACE, {"logit_bias": np.zeros(1)}, r"unexpected tensor logit_bias \(1 in all\)"),
        (
            STATE,
            {"token_embedding.weight": STATE["token_embedding.weight"][:-1]},
            "vocabulary of 49,407 tokens",
        ),
        (
            RELEASED,
            {"module.image_encoder.proj": STATE["visual.proj"] + 1},
            "image_encoder.proj differs",
        ),
        (RELEASED, {"module.head.weight": np.ones(3)}, "unexpected tensor head.weight"),
        (RELEASED, {TEXT_PROMPTS: None}, "text_prompts is missing"),
        (RELEASED, {k: None for k in RELEASED if "clip." in k}, r"clip\.logit_scale is missing"),
        (RELEASED, {TEXT_PROMPTS: np.zeros((3, 5, 10), "f4")}, r"has shape \(3, 5, 10\)"),
        (RELEASED, {VISUAL_PROMPTS: np.zeros((3, 3, 128), "f4")}, "visual_prompts has shape"),
    ],
)
def test_a_wrong_tensor_is_named(state, changes, message, tmp_path):
    """None: it is missing."""
    changed = {k: np.array(v, order="C") for k, v in {**state, **changes}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        convert(save_safetensors(tmp_path / "a.safetensors", changed))


# Wrong files.


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["pickle", "weights", "beside the weights"])
def test_objects_in_a_pickle_are_refused_and_never_run(place, tmp_path):
    path, target = tmp_path / "bad.pt", tmp_path / "bomb"
    if place == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Bomb(target)}))
    elif place == "weights":
        torch.save({"state_dict": {"visual.proj": Bomb(target)}}, path)
    else:
        torch.save({"state_dict": tensors(STATE), "config": Bomb(target)}, path)
    named = "" if place == "pickle" else r"holds \S+mkdir: "
    with pytest.raises(UserError, match=f"{named}Python objects other") as error:
        convert(path)
    assert "\n" not in str(error.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb would have worked"


def truncated(name):
    """A function that writes half of a file of a good format."""

    def write(path):
        FORMATS[name](path)
        os.truncate(path, path.stat().st_size // 2)

    return write


def flip_a_bit(path):
    data = bytearray(FORMATS["state_dict.pt"](path).read_bytes())
    data[len(data) // 2] ^= 1  # in a tensor
    path.write_bytes(data)


def float8(path):
    """Of a type that NumPy lacks."""
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")


WRONG = {
    "empty": lambda p: p.write_bytes(b""),
    "page": lambda p: p.write_text("<!DOCTYPE html><html>Not found</html>"),
    "pointer": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "directory": lambda p: p.mkdir(),
    "missing": lambda p: None,
    "truncated archive": truncated("archive.pt"),
    "truncated state": truncated("state_dict.pt"),
    "truncated safetensors": truncated("bfloat16.safetensors"),
    "flipped bit": flip_a_bit,
    "sparse": lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p),
    "nowhere": lambda p: torch.save({"a": torch.ones(2, device="meta")}, p),
    "float8": float8,
    "list": lambda p: p.write_bytes(pickle.dumps([1, 2], protocol=2)),
    "no tensor": lambda p: save_torch(p, STATE, "epoch"),
    "another model": lambda p: save_torch(p, {"fc.weight": np.zeros((2, 2))}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_line_that_names_it(kind, tmp_path):
    path = tmp_path / "source.pt"
    WRONG[kind](path)
    with pytest.raises(UserError, match=r"source\.pt") as error:
        convert(path)
    assert "\n" not in str(error.value)


def test_safetensors_need_no_torch(tmp_path, monkeypatch):
    safe = save_safetensors(tmp_path / "a.safetensors", STATE)
    state = FORMATS["state_dict.pt"](tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    assert fingerprint(convert(safe).params) == EXPECTED
    with pytest.raises(UserError, match=r'needs torch: pip install -e "\.\[convert\]"'):
        convert(state)
