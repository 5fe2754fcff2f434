"""Methods by name: what each adds to CLIP and which parameters it trains."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vop_jax.clip.config import ClipConfig
from vop_jax.errors import UserError

# The paper counts tensors named *.weight or *.bias of OpenAI's CLIP. It thereby misses what
# PyTorch holds as bare parameters: packed query/key/value, embeddings and projections.
_BARE = (
    r"clip/.*/attn/(query|key|value)/.*",
    r"clip/.*/(class_embedding|positional_embedding)",
    r"clip/(visual/proj|text/text_projection)/kernel",
    r"clip/logit_scale",
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the paper's main table.

    Attributes:
        trainable: patterns over parameter names; `{visual}` and `{text}` stand for the index
            of the last layer of each tower.
        prompts: whether prompts are added to CLIP.
        paper_excludes: trained parameters that the paper's count leaves out.
    """

    trainable: tuple[str, ...]
    prompts: bool = False
    paper_excludes: tuple[str, ...] = _BARE


METHODS: dict[str, Method] = {
    "zero_shot": Method(trainable=()),
    "full": Method(trainable=(r"clip/.*",)),
    "bias": Method(trainable=(r"clip/.*/bias",)),
    # Nothing else is trained here, so the paper counts the bare projections after all.
    "proj": Method(
        trainable=(r"clip/visual/proj/kernel", r"clip/text/text_projection/kernel"),
        paper_excludes=(),
    ),
    "partial": Method(
        trainable=(
            r"clip/visual/transformer/resblocks\.{visual}/.*",
            r"clip/text/transformer/resblocks\.{text}/.*",
        )
    ),
    "vop": Method(trainable=(r"prompts/.*",), prompts=True),
}

BRANCHES = {"both": ("visual", "text"), "visual": ("visual",), "text": ("text",)}
SUFFIXES = ("eot", "released")


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """A method and the sizes of its prompts; the comments are in `vop_jax.config`."""

    name: str = "vop"
    branches: str = "both"
    visual_prompts: int = 8
    text_prefix: int = 4
    text_suffix: int = 4
    suffix: str = "eot"
    first_layer: int = 1
    last_layer: int = 0
    init_std: float = 0.02

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "MethodConfig":
        """Builds and validates the part of the config named `method`.

        Raises:
            UserError: a name or size that cannot be; the message names what is allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"method.{unknown[0]}: unknown; known are {', '.join(sorted(known))}")
        method = cls(**values)
        method.validate()
        return method

    def validate(self) -> None:
        """Raises UserError for values that no CLIP could take."""
        choices: dict[str, Collection[str]] = {
            "name": METHODS,
            "branches": BRANCHES,
            "suffix": SUFFIXES,
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"method.{key}={getattr(self, key)!r}: allowed are {', '.join(allowed)}"
                )
        for key in ("visual_prompts", "text_prefix", "text_suffix", "last_layer"):
            if getattr(self, key) < 0:
                raise UserError(f"method.{key}={getattr(self, key)}: must be 0 or more")
        if self.first_layer < 1 or 0 < self.last_layer < self.first_layer:
            raise UserError(
                f"method.first_layer={self.first_layer}, last_layer={self.last_layer}: layers "
                "count from 1, the last (0: the deepest) is not before the first"
            )
        if self.prompts and not self.visual_tokens + self.text_tokens:
            raise UserError(
                f"method.name={self.name}: no prompt token in branches={self.branches}; raise "
                "visual_prompts, text_prefix or text_suffix, or use zero_shot"
            )

    @property
    def prompts(self) -> bool:
        """Whether the method adds prompts at all."""
        return METHODS[self.name].prompts

    @property
    def visual_tokens(self) -> int:
        """P of the vision tower; 0 without its branch."""
        on = self.prompts and "visual" in BRANCHES[self.branches]
        return self.visual_prompts if on else 0

    @property
    def text_tokens(self) -> int:
        """P of the text tower; 0 without its branch."""
        on = self.prompts and "text" in BRANCHES[self.branches]
        return self.text_prefix + self.text_suffix if on else 0

    def layers(self, depth: int) -> range:
        """The prompted layers, from 0, of a tower with `depth` layers."""
        last = min(self.last_layer or depth, depth)
        return range(self.first_layer - 1, last)

    def text_slots(self, clip: ClipConfig) -> int:
        """T, the token slots a caption has: the context less the prompts."""
        return clip.context_length - self.text_tokens

    def check_fits(self, clip: ClipConfig) -> None:
        """Raises UserError when these prompts do not fit a CLIP of these sizes."""
        depth = {"visual": clip.vision_layers, "text": clip.text_layers}
        deepest = max(depth.values())
        if max(self.first_layer, self.last_layer) > deepest:
            raise UserError(
                f"method.first_layer={self.first_layer}, last_layer={self.last_layer}: this "
                f"CLIP has layers 1 to {deepest}"
            )
        for tower, tokens in (("visual", self.visual_tokens), ("text", self.text_tokens)):
            if tokens and not len(self.layers(depth[tower])):
                raise UserError(
                    f"method.first_layer={self.first_layer}: the {tower} tower has only "
                    f"{depth[tower]} layers; lower it or choose branches without {tower}"
                )
        if self.text_slots(clip) < 3:
            raise UserError(
                f"method.text_prefix + text_suffix = {self.text_tokens}: at most "
                f"{clip.context_length - 3} of {clip.context_length} positions can be prompts"
            )

    def trainable_patterns(self, clip: ClipConfig) -> tuple[str, ...]:
        """The patterns of the trained parameters in the tree {clip, prompts}."""
        last = {"{visual}": clip.vision_layers - 1, "{text}": clip.text_layers - 1}
        patterns = METHODS[self.name].trainable
        for placeholder, index in last.items():
            patterns = tuple(p.replace(placeholder, str(index)) for p in patterns)
        return patterns
