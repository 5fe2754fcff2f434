"""Conversion of PyTorch checkpoints to the parameter tree of `clip.model.Clip`.

`state_dict` reads the tensors, `source_config` the files beside them; `layouts` has the names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vop_jax.clip.convert import layouts, source_config, state_dict, vop_checkpoint
from vop_jax.clip.convert.source_config import PixelStatistics, SourceConfig
from vop_jax.clip.convert.source_keys import PUBLISHED_HEADS
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.storage.files import StrPath


@dataclasses.dataclass(frozen=True)
class ConvertedClip:
    """The content of a checkpoint.

    Attributes:
        params: the parameter tree of `clip.model.Clip`, float32, for frames normalised as
            OpenAI's.
        prompts: of a released VoP checkpoint, {"visual": [L, P, D], "text": [L, P, D]}.
        released: the config of its method; None if no file states it.
        sha256: of the file.
        notes: what was assumed or left out, one sentence each.
    """

    params: dict[str, Any]
    config: ClipConfig
    prompts: dict[str, np.ndarray] | None
    released: vop_checkpoint.ReleasedConfig | None
    sha256: str
    notes: tuple[str, ...]


def convert(
    path: StrPath,
    *,
    activation: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    ema: bool = False,
) -> ConvertedClip:
    """Converts a checkpoint of OpenAI, open_clip, Hugging Face or the released VoP.

    Sizes come from the tensors. Heads, activation and pixel statistics come from the configs
    beside the file, else from the arguments; else heads are those of the published models of this
    width, and the rest is OpenAI's. For OpenAI's archives and the released VoP all are known.

    Args:
        path: the file, or the index of its shards.
        ema: takes the running average of the weights from the file instead of the weights.

    Raises:
        UserError: the file is not a checkpoint or holds Python objects; tensors are missing,
            misshapen or unexpected; a config contradicts them or an argument; or the model is of
            another kind.
    """
    state = state_dict.read(path, ema=ema)
    tensors, prompts, released = state.tensors, None, None
    openai = ""  # what implies that everything is as OpenAI's
    if not vop_checkpoint.PROMPTS.isdisjoint(tensors):
        openai, (tensors, prompts) = "the released VoP", vop_checkpoint.split(path, tensors)
    elif state.torchscript and "input_resolution" in tensors:
        openai = "a TorchScript archive"
    elif any(name.startswith("text.") for name in tensors):  # open_clip's CustomTextCLIP
        tensors = state_dict.without_prefix(path, tensors, "text.")
    layout = layouts.layout_of(tensors)
    source = SourceConfig() if openai else source_config.read_config(path, layout)
    sizes = layouts.read_sizes(path, tensors, layout)
    if openai:
        source = source_config.openai_config(openai, sizes["vision_width"], sizes["text_width"])
    patches = sizes["image_size"] // sizes["patch_size"]
    for field, *_, value in source.sizes:
        if field == "image_size" and value // sizes["patch_size"] == patches:
            sizes["image_size"] = value  # no tensor shows pixels that fill no patch
    source.check_sizes(path, sizes)
    layouts.check_constants(path, tensors, sizes)
    if sizes["vocab_size"] != ClipConfig.vocab_size:
        raise UserError(
            f"{path}: a vocabulary of {sizes['vocab_size']:,} tokens; only CLIP's own tokenizer "
            f"with {ClipConfig.vocab_size:,} is supported"
        )
    arguments = {"activation": activation, "vision_heads": vision_heads, "text_heads": text_heads}
    config, assumptions = complete_config(path, sizes, source, arguments)
    params = layouts.to_flax(path, tensors, layout, config)
    if source.pixels:
        fold_pixels(params, source.pixels)
    if prompts is not None:
        vop_checkpoint.check_prompts(path, prompts, config)
        released = vop_checkpoint.read_config(path, prompts, config)
    notes = (*state.notes, *source.notes, *assumptions)
    return ConvertedClip(params, config, prompts, released, state.sha256, notes)


def complete_config(
    path: StrPath,
    sizes: Mapping[str, int],
    source: SourceConfig,
    arguments: Mapping[str, Any],
) -> tuple[ClipConfig, list[str]]:
    """The config of these sizes, and a note on each value that is assumed.

    Args:
        arguments: "activation", "vision_heads" and "text_heads"; None: not given.

    Raises:
        UserError: an argument contradicts the source config, or heads are unknown or do not divide
            the width.
    """
    fields, notes = dict[str, Any](sizes), []
    for field, argument in arguments.items():
        stated = getattr(source, field)
        if argument and stated and argument != stated:
            flag = f"--{field.replace('_', '-')}={argument}"
            raise UserError(f"{flag} contradicts {source.origin}, which states {stated}")
        fields[field] = stated if argument is None else argument
    if fields["activation"] is None:
        fields["activation"] = "quick_gelu"
        notes.append(
            f"nothing states the activation of {path}; quick_gelu is assumed, as OpenAI's; for a "
            "model trained with gelu, as open_clip's LAION models, pass --activation=gelu"
        )
    if not source.pixels:
        notes.append(
            f"nothing states the pixel mean and std of {path}; OpenAI's are assumed; if they "
            "differ, put the file that states them beside it: preprocessor_config.json, or "
            "open_clip_config.json for a checkpoint of open_clip"
        )
    for tower in ("vision", "text"):
        width, heads, flag = sizes[f"{tower}_width"], fields[f"{tower}_heads"], f"--{tower}-heads"
        if heads is None:
            heads = PUBLISHED_HEADS[tower].get(width)
            if heads is None:
                raise UserError(
                    f"{path}: nothing states the heads of the {tower} tower, and no published CLIP "
                    f"has its width, {width}; pass {flag}"
                )
            notes.append(
                f"nothing states the heads of the {tower} tower of {path}; {heads} are assumed, as "
                f"in every published CLIP of width {width}; {flag} changes them"
            )
        if type(heads) is not int or heads < 1 or width % heads:
            origin = source.origin if getattr(source, f"{tower}_heads") is not None else path
            raise UserError(
                f"{origin}: {tower} width {width} cannot be divided into {heads} heads; correct "
                f"the file or pass a divisor as {flag}"
            )
        mlp = sizes[f"{tower}_mlp"]
        fields |= {f"{tower}_heads": heads, f"{tower}_mlp": None if mlp == 4 * width else mlp}
    return ClipConfig(**fields), notes


def fold_pixels(params: Mapping[str, Any], pixels: PixelStatistics) -> None:
    """Adapts a CLIP trained with other pixel statistics to OpenAI's, in place.

    With x = (v - mean) / std of a channel and y the same with OpenAI's, x = a y + b. The patch
    kernel absorbs a; its response to b is the same for every frame and joins the positions.
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
