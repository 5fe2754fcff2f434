"""What the config file beside a checkpoint tells: its activation and its heads."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from vop_jax.clip import layouts
from vop_jax.clip.layers import ACTIVATIONS
from vop_jax.clip.norm import EPS
from vop_jax.errors import UserError

HEAD_WIDTH = 64  # in every published CLIP with a ViT-B or ViT-L


@dataclasses.dataclass(frozen=True)
class Told:
    """What is known of a checkpoint beside its tensors, and by which source."""

    by: str = ""
    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None


def read_config(path: str | os.PathLike, layout: layouts.Layout) -> Told:
    """What the config beside a checkpoint tells; nothing without one.

    Raises:
        UserError: the config cannot be read, or describes a model that this CLIP cannot be.
    """
    hugging_face = layout is layouts.HUGGING_FACE
    file = epath.Path(path).parent / ("config.json" if hugging_face else "open_clip_config.json")
    if not file.exists():
        return Told()
    try:
        config = json.loads(file.read_text())
        return (_told_hugging_face if hugging_face else _told_open_clip)(str(file), config)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: not a readable config of a CLIP ({error!r})") from None


def _told_hugging_face(by: str, config: Mapping[str, Any]) -> Told:
    # What a config leaves out has the value that transformers gives it.
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
        found = " and ".join(sorted(activations))
        raise UserError(f"{by}: hidden_act is {found}, allowed is one of {', '.join(ACTIVATIONS)}")
    for tower in (vision, text):
        if (eps := tower.get("layer_norm_eps", EPS)) != EPS:
            raise UserError(f"{by}: layer_norm_eps is {eps}, allowed is {EPS}")
    return Told(
        by,
        activations.pop(),
        vision.get("num_attention_heads", 12),
        text.get("num_attention_heads", 8),
    )


def _told_open_clip(by: str, config: Mapping[str, Any]) -> Told:
    # What a config leaves out has the value that open_clip gives it.
    model = config.get("model_cfg", config)
    vision, text = model["vision_cfg"], model["text_cfg"]
    return Told(
        by,
        "quick_gelu" if model.get("quick_gelu", False) else "gelu",
        vision.get("width", 768) // vision.get("head_width", 64),
        text.get("heads", 8),
    )


def settle(flag: str, asked: Any, told: Any, by: str) -> Any:
    """What the caller asked for or the config told; UserError where they contradict."""
    if asked and told and asked != told:
        raise UserError(f"--{flag}={asked} contradicts {by}, which says {told}")
    return asked or told


def choose_heads(
    path: str | os.PathLike, tower: str, width: int, asked: int | None, told: Told
) -> int:
    """The heads of a tower ("vision" or "text"): told, else asked for, else by its width.

    Raises:
        UserError: `asked` contradicts the config, or the width has no such divisor.
    """
    known = settle(f"{tower}-heads", asked, getattr(told, f"{tower}_heads"), told.by)
    heads = known or max(1, width // HEAD_WIDTH)
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(
            f"{path}: {tower} width {width} cannot be parted into {heads} heads; pass a divisor "
            f"of it as --{tower}-heads"
        )
    return heads
