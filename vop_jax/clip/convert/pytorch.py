"""CLIP weights of PyTorch become ours: checkpoints of every published kind.

`clip.state_dict` reads the tensors, `clip.source_config` what lies beside them, and
`clip.layouts` has the names.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vop_jax.clip.convert import layouts, source_config, state_dict, vop_checkpoint
from vop_jax.clip.convert.source_config import Facts, Pixels, choose_heads, settle
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a checkpoint holds.

    Attributes:
        params: the parameter tree of `clip.model.Clip`, float32, for frames normalised as
            OpenAI's.
        config: sizes read off the tensors; heads and activation as `convert` says.
        prompts: of a released VoP checkpoint, {"visual": [L, P, D], "text": [L, P, D]}.
        configuration: of its method; None where nothing states it.
        sha256: of the file.
        notes: what was assumed and what was left, one sentence each.
    """

    params: dict[str, Any]
    config: ClipConfig
    prompts: dict[str, np.ndarray] | None
    configuration: vop_checkpoint.Configuration | None
    sha256: str
    notes: tuple[str, ...]


def convert(
    path: str | os.PathLike,
    *,
    activation: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    ema: bool = False,
) -> Converted:
    """Reads a checkpoint of OpenAI, open_clip, Hugging Face or the released VoP.

    Heads, activation and pixel statistics come from the configs beside the file (see
    `source_config.read_config`), else from the arguments, else heads are those of the published
    models of this width, and the rest is OpenAI's. OpenAI's archives and the released VoP are
    known.

    Args:
        path: the file, or the index of its shards.
        ema: takes the running average of the weights that the file holds.

    Raises:
        UserError: a file that is not a checkpoint, one with Python objects in it, tensors that
            are missing, misshapen or unexpected, a config that contradicts them or an argument,
            or a model of another kind.
    """
    state = state_dict.read(path, ema=ema)
    tensors, prompts, configuration = state.tensors, None, None
    openai = "a TorchScript archive" if state.torchscript and "input_resolution" in tensors else ""
    if not vop_checkpoint.PROMPTS.isdisjoint(tensors):
        tensors, prompts = vop_checkpoint.split(path, tensors)
        openai = "the released VoP"
    elif any(name.startswith("text.") for name in tensors):  # open_clip's CustomTextCLIP
        tensors = state_dict.without_prefix(path, tensors, "text.")
    layout = layouts.layout_of(tensors)
    facts = Facts() if openai else source_config.read_config(path, layout)
    sizes = layouts.read_sizes(path, tensors, layout)
    if openai:
        facts = source_config.openai_facts(openai, sizes["vision_width"], sizes["text_width"])
    stated = dict(facts.sizes).get("image_size")
    if stated and stated.value // sizes["patch_size"] == sizes["image_size"] // sizes["patch_size"]:
        sizes["image_size"] = stated.value  # what does not fill a patch shows in no tensor
    facts.check_sizes(path, sizes)
    layouts.check_constants(path, tensors, sizes)
    if sizes["vocab_size"] != ClipConfig.vocab_size:
        raise UserError(
            f"{path}: a vocabulary of {sizes['vocab_size']:,} tokens, of another tokenizer than "
            f"CLIP's own, of {ClipConfig.vocab_size:,}: captions could not be read"
        )
    config, assumed = _complete(path, sizes, facts, activation, vision_heads, text_heads)
    params = layouts.to_flax(path, tensors, layout, config)
    if facts.pixels:
        fold_pixels(params, facts.pixels)
    if prompts is not None:
        vop_checkpoint.check_prompts(path, prompts, config)
        configuration = vop_checkpoint.read_configuration(path, prompts, config)
    notes = (*state.notes, *facts.notes, *assumed)
    return Converted(params, config, prompts, configuration, state.sha256, notes)


def _complete(
    path: str | os.PathLike,
    sizes: Mapping[str, int],
    facts: Facts,
    activation: str | None,
    vision_heads: int | None,
    text_heads: int | None,
) -> tuple[ClipConfig, list[str]]:
    """The config of these sizes, and a sentence on each thing that is assumed."""
    notes = []
    if not (facts.activation or activation):
        notes.append(
            f"nothing states the activation of {path}: quick_gelu, as OpenAI's; if it was trained "
            "with gelu, as open_clip's LAION models, pass --activation=gelu"
        )
    if not facts.pixels:
        notes.append(
            f"nothing states the pixel mean and std of {path}: OpenAI's; if they are others, put "
            "beside it the file that states them: preprocessor_config.json, or of a checkpoint of "
            "open_clip open_clip_config.json"
        )
    heads = {}
    for tower, asked in (("vision", vision_heads), ("text", text_heads)):
        width = sizes[f"{tower}_width"]
        heads[f"{tower}_heads"], note = choose_heads(path, tower, width, asked, facts)
        notes += [note] if note else []
    mlps = {
        f"{tower}_mlp": None if sizes[f"{tower}_mlp"] == 4 * width else sizes[f"{tower}_mlp"]
        for tower, width in (("vision", sizes["vision_width"]), ("text", sizes["text_width"]))
    }
    chosen = settle("activation", activation, facts.activation, facts.by) or "quick_gelu"
    config = ClipConfig(**{**sizes, **heads, **mlps}, activation=chosen)  # type: ignore[arg-type]
    return config, notes


def fold_pixels(params: Mapping[str, Any], pixels: Pixels) -> None:
    """Brings a CLIP that was trained with other pixel statistics to OpenAI's, in place.

    With x = (v - mean) / std of a channel and y the same of OpenAI's, x = a y + b. A patch's
    kernel takes up a; what it makes of b is the same for every frame and joins its position.
    """
    if pixels == (PIXEL_MEAN, PIXEL_STD):
        return
    mean, std = np.array(pixels)
    visual = params["visual"]
    kernel = visual["conv1"]["kernel"].astype(np.float64)  # [h, w, C, D]
    shift = np.einsum("hwcd,c->d", kernel, (np.array(PIXEL_MEAN) - mean) / std)
    scaled = kernel * (np.array(PIXEL_STD) / std)[:, None]
    visual["conv1"]["kernel"] = scaled.astype(np.float32)
    positions = visual["positional_embedding"].astype(np.float64)
    positions[1:] += shift  # the first is the CLS token's
    visual["positional_embedding"] = positions.astype(np.float32)
