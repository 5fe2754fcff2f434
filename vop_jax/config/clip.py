"""The sizes of a CLIP: what must be known before its parameters have shapes."""

import dataclasses

from ml_collections import ConfigDict

from vop_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """One CLIP with a ViT.

    Attributes:
        vision_mlp, text_mlp: width inside the MLPs; None is four times the tower's.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    embed_dim: int
    context_length: int = 77
    vocab_size: int = 49408
    activation: str = "quick_gelu"
    vision_mlp: int | None = None
    text_mlp: int | None = None

    @property
    def patches(self) -> int:
        """G, the number of patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    def to_dict(self) -> dict[str, int | str | None]:
        return dataclasses.asdict(self)


PRESETS: dict[str, ClipConfig] = {
    "ViT-B/32": ClipConfig(224, 32, 768, 12, 12, 512, 12, 8, 512),
    "ViT-B/16": ClipConfig(224, 16, 768, 12, 12, 512, 12, 8, 512),
    "ViT-L/14": ClipConfig(224, 14, 1024, 24, 16, 768, 12, 12, 768),
    "ViT-L/14@336px": ClipConfig(336, 14, 1024, 24, 16, 768, 12, 12, 768),
    # The demo's: small enough to pre-train on two cores in a minute.
    "tiny": ClipConfig(32, 8, 64, 4, 1, 64, 3, 1, 64, context_length=32),
    # The motion benchmark's full setting.
    "small": ClipConfig(32, 8, 128, 6, 2, 128, 4, 2, 128, context_length=32),
}


def arch_name(config: ClipConfig) -> str:
    """The published name of these sizes, or a descriptive one."""
    for name, preset in PRESETS.items():
        if dataclasses.replace(config, activation=preset.activation) == preset:
            return name
    return (
        f"ViT-{config.vision_layers}x{config.vision_width}/{config.patch_size}"
        f"@{config.image_size}px"
    )


def preset(config: ConfigDict, default: str = "") -> ClipConfig:
    """The sizes that `config.clip.arch` names; UserError lists the known names."""
    arch = config.clip.arch or default
    if arch not in PRESETS:
        raise UserError(f"config.clip.arch={arch!r}: allowed are {', '.join(PRESETS)}")
    known = PRESETS[arch]
    return dataclasses.replace(known, activation=config.clip.activation or known.activation)
