"""The checkpoint that VoP's authors released: CLIP, CLIP again in its encoders, and prompts."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from vop_jax.clip.convert import layouts
from vop_jax.clip.convert.layouts import Tensors, check_tensor
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.storage import files
from vop_jax.storage.files import StrPath
from vop_jax.storage.tensors import Tree

VISUAL_PROMPTS = "visual_prompt_learner.visual_prompts"
TEXT_PROMPTS = "text_prompt_learner.text_prompts"
PROMPTS = {VISUAL_PROMPTS, TEXT_PROMPTS}


def split(path: StrPath, tensors: Tensors) -> tuple[Tensors, dict[str, np.ndarray]]:
    """(the tensors of CLIP, the prompts) of a released VoP checkpoint.

    It holds CLIP under `clip.` and again under `image_encoder.` and `text_encoder.`. The copies
    are dropped after a check that they are equal.

    Raises:
        UserError: prompts are missing, a copy differs, or there are other tensors.
    """
    for name in (VISUAL_PROMPTS, TEXT_PROMPTS, "clip.logit_scale"):
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing")
    clip = {k.removeprefix("clip."): v for k, v in tensors.items() if k.startswith("clip.")}
    for name, tensor in tensors.items():
        if name.startswith("clip.") or name in PROMPTS:
            continue
        encoder, _, rest = name.partition(".")
        if encoder not in ("image_encoder", "text_encoder"):
            raise UserError(f"{path}: unexpected tensor {name} for a released VoP checkpoint")
        original = f"visual.{rest}" if encoder == "image_encoder" else rest
        if original in clip and not np.array_equal(tensor, clip[original]):
            raise UserError(f"{path}: tensor {name} differs from clip.{original}, its original")
    visual, text = tensors[VISUAL_PROMPTS], tensors[TEXT_PROMPTS]
    if visual.ndim != 4 or visual.shape[1] != 1:
        raise UserError(
            f"{path}: tensor {VISUAL_PROMPTS} has shape {visual.shape}, expected [L, 1, P, D]"
        )
    return clip, {"visual": visual[:, 0].astype("f4"), "text": text.astype("f4")}


def check_prompts(path: StrPath, prompts: Mapping[str, np.ndarray], config: ClipConfig) -> None:
    """Raises UserError unless the prompts fit a CLIP of these sizes."""
    for tower, name, layers, width in (
        ("visual", VISUAL_PROMPTS, config.vision_layers, config.vision_width),
        ("text", TEXT_PROMPTS, config.text_layers, config.text_width),
    ):
        length = prompts[tower].shape[1] if prompts[tower].ndim == 3 else 0
        check_tensor(path, name, prompts[tower], (layers, max(1, length), width))


class ReleasedConfig(NamedTuple):
    """The configuration.json beside a released checkpoint."""

    text_prefix: int
    text_suffix: int
    frames: int | None


def read_config(
    path: StrPath, prompts: Mapping[str, np.ndarray], config: ClipConfig
) -> ReleasedConfig | None:
    """Reads the configuration.json beside a checkpoint; None without one.

    Raises:
        UserError: it contradicts the tensors, or states something the method does not support.
    """
    file = epath.Path(path).parent / "configuration.json"
    if not file.exists():
        return None
    try:
        stated = json.loads(file.read_text())["hyperparam"]
        prefix, suffix = stated["tp_prefix_token_num"], stated["tp_suffix_token_num"]
        frames = stated.get("num_frames")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not the configuration of a VoP ({error!r})") from None
    for key, value, least in (
        ("tp_prefix_token_num", prefix, 0),
        ("tp_suffix_token_num", suffix, 0),
        ("num_frames", 1 if frames is None else frames, 1),
    ):
        if type(value) is not int or value < least:
            raise UserError(f"{file}: {key}={value!r:.80}: not a whole number of {least} or more")
    visual, text = prompts["visual"].shape[1], prompts["text"].shape[1]
    if prefix + suffix != text:
        raise UserError(
            f"{file}: {prefix} + {suffix} text prompts, but {path} has {text} in each layer"
        )
    expected = {"vp_token_num": visual, "input_res": config.image_size, "pooling_type": "avg"}
    for key, value in expected.items():
        if stated.get(key) not in (None, value):
            raise UserError(f"{file}: {key}={stated[key]!r}, but {path} needs {value!r}")
    return ReleasedConfig(prefix, suffix, frames)


def join(params: Tree, config: ClipConfig, prompts: Mapping[str, np.ndarray]) -> Tensors:
    """The inverse of `split`: tensors by the names of the released model.

    Args:
        params: the parameter tree of `clip.model.Clip`.
        prompts: {"visual": [L, P, D], "text": [L, P, D]}, of all layers.
    """
    clip = layouts.from_flax(params, layouts.OPENAI, config)
    tensors = {f"clip.{name}": tensor for name, tensor in clip.items()}
    for name, tensor in clip.items():
        if name.startswith("visual."):
            tensors[f"image_encoder.{name.removeprefix('visual.')}"] = tensor
        elif name != "logit_scale":
            tensors[f"text_encoder.{name}"] = tensor
    tensors[VISUAL_PROMPTS] = np.array(prompts["visual"][:, None], np.float32, order="C")
    tensors[TEXT_PROMPTS] = np.array(prompts["text"], np.float32, order="C")
    return tensors


def save(path: StrPath, tensors: Tensors) -> None:
    """Writes the tensors of `join` as the authors did, atomically.

    Raises:
        UserError: torch is missing.
    """
    torch = import_torch(f"{path}: writing PyTorch files")
    # The same array becomes the same tensor, which the file stores once.
    torch_tensors = {id(tensor): torch.from_numpy(tensor) for tensor in tensors.values()}
    state = {f"module.{name}": torch_tensors[id(tensor)] for name, tensor in tensors.items()}
    with files.replacing(path) as place, open(place, "wb") as file:
        torch.save({"state_dict": state}, file)


def import_torch(purpose: str) -> Any:
    """The package torch; UserError if it is missing: `purpose` needs it."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{purpose} needs torch: pip install -e ".[convert]"; safetensors files need nothing'
        ) from None
    return torch
