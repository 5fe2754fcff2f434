"""What the released VoP code can compute: one method, over CLIPs of OpenAI's kind."""

import dataclasses

from vop_jax.clip.convert.source_config import HEAD_WIDTH
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.tuning.methods import MethodConfig


def released_method(visual: int, text: int, prefix: int | None = None) -> MethodConfig:
    """The method of a checkpoint with so many prompt tokens in every layer of its towers.

    Args:
        prefix: how many of the text prompts are prefix; half of them if not said.
    """
    prefix = text // 2 if prefix is None else prefix
    return MethodConfig(
        visual_prompts=visual,
        text_prefix=prefix,
        text_suffix=text - prefix,
        suffix="released",
    )


def check_released(where: str, method: MethodConfig, clip: ClipConfig) -> None:
    """Raises UserError unless the released code computes the same as `method` over `clip`.

    The message names the settings to train with instead.
    """
    if method.name != "vop":
        raise UserError(
            f"{where}: holds method vop alone, not {method.name}; train with "
            "--config.method.name=vop --config.method.suffix=released"
        )
    if not method.visual_tokens or not method.text_tokens:
        raise UserError(
            f"{where}: holds prompts of both towers; this method has them in one; train with "
            "--config.method.branches=both and prompts in both towers"
        )
    released = released_method(method.visual_tokens, method.text_tokens)
    for key in ("suffix", "text_prefix", "text_suffix"):
        mine, theirs = getattr(method, key), getattr(released, key)
        if mine != theirs:
            raise UserError(
                f"{where}: the released code computes method.{key}={theirs!r}, not {mine!r}; "
                f"train with --config.method.{key}={theirs}"
            )
    if any(method.layers(n) != range(n) for n in (clip.vision_layers, clip.text_layers)):
        raise UserError(
            f"{where}: holds prompts of all layers, not of method.first_layer="
            f"{method.first_layer}, last_layer={method.last_layer}; train with "
            "--config.method.first_layer=1 --config.method.last_layer=0"
        )
    known = dataclasses.replace(
        clip,
        activation="quick_gelu",
        vision_heads=max(1, clip.vision_width // HEAD_WIDTH),
        text_heads=max(1, clip.text_width // HEAD_WIDTH),
        vision_mlp=None,
        text_mlp=None,
    )
    for key, value in known.to_dict().items():
        if (mine := getattr(clip, key)) != value:
            raise UserError(
                f"{where}: the released code has CLIP's {key}={value!r}, not {mine!r}; train over "
                "a CLIP such as OpenAI's"
            )
