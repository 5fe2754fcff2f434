"""The parameters of `vop_jax` by the names and layouts of the PyTorch peer."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from benchmarks.torch_vop import TorchVop


def to_state(flat: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Parameters of `vop_jax`, or some, by name -> the same by the peer's names and layouts."""
    state: dict[str, np.ndarray] = {}
    packed: dict[tuple[str, str, str], np.ndarray] = {}
    for name, value in flat.items():
        array = np.asarray(value)
        name = re.sub(r"^clip/", "", name).replace("transformer/resblocks.", "blocks/")
        name = re.sub(r"^adapters/(\w+)_(\d+)/", r"\1/blocks/\2/adapter/", name)
        name = name.replace("text_projection", "proj").replace("/embedding", "/weight")
        name = name.replace("/scale", "/weight").replace("/", ".")
        if match := re.fullmatch(r"prompts\.context\.lstm\.(input|hidden)?_?(kernel|bias)", name):
            torch_name = {"input": "weight_ih", "hidden": "weight_hh", None: "bias_ih"}[match[1]]
            for suffix, row in zip(("", "_reverse"), array, strict=True):
                state[f"prompts.context.lstm.{torch_name}_l0{suffix}"] = row.T
        elif match := re.fullmatch(r"(.*\.attn)\.(query|key|value)\.(kernel|bias)", name):
            flat_heads = (
                array.reshape(-1) if match[3] == "bias" else array.reshape(len(array), -1).T
            )
            packed[match[1], match[3], match[2]] = flat_heads
        elif name.endswith("kernel"):
            if array.ndim == 4:  # of conv1
                array = array.transpose(3, 2, 0, 1)
            else:  # [H, D/H, D] of attention's out
                array = array.reshape(-1, array.shape[-1]).T
            state[name.removesuffix("kernel") + "weight"] = array
        else:
            state[name] = array
    for prefix, kind in dict.fromkeys((key[0], key[1]) for key in packed):
        rows = [packed[prefix, kind, part] for part in ("query", "key", "value")]
        torch_name = {"kernel": "weight", "bias": "bias"}[kind]
        state[f"{prefix}.qkv.{torch_name}"] = np.concatenate(rows)
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in state.items()}


def load(model: TorchVop, flat: Mapping[str, np.ndarray], trained: Iterable[str]) -> TorchVop:
    """Fills the peer with all parameters of `vop_jax`; those in `trained` alone get gradients.

    Raises:
        ValueError: a parameter that one of the two does not have.
    """
    difference = model.load_state_dict(to_state(flat), strict=False)
    missing = [name for name in difference.missing_keys if "bias_hh" not in name]
    if missing or difference.unexpected_keys:
        raise ValueError(f"not filled: {missing}; unknown: {difference.unexpected_keys}")
    names = to_state({name: flat[name] for name in trained}).keys()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for tower in (model.visual, model.text):
        for parameter in tower.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(model.dtype)
    return model
