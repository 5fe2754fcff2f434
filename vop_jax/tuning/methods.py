"""The methods by name: what each adds to CLIP and which parameters it trains.

A method is a row of METHODS, a composition of orthogonal parts: generic prompts, prompts specific
to a frame (by its position, or generated from its context), attention across frames (function),
adapters, and a choice of CLIP's own parameters. A new part of prompts is a module in
`tuning.prompts.GENERATORS`; nothing else in the package names a method.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vop_jax.config.clip import ClipConfig
from vop_jax.config.keys import KEYS, DataSection, MethodSection
from vop_jax.errors import UserError

# How often the paper counts a parameter whose name matches; all others count once. The paper counts
# tensors named *.weight or *.bias of OpenAI's CLIP and so misses what PyTorch has as bare
# parameters: packed query/key/value, embeddings and projections.
_CLIP_FACTORS = (
    (r"clip/.*/attn/(query|key|value)/.*", 0),
    (r"clip/.*/(class_embedding|positional_embedding)", 0),
    (r"clip/(visual/proj|text/text_projection)/kernel", 0),
    (r"clip/logit_scale", 0),
)
# It leaves the frame position embedding out; PyTorch's LSTM has two bias vectors, of which only the
# sum matters.
_PROMPT_FACTORS = ((r"prompts/frame_position", 0), (r"prompts/context/lstm/bias", 2))


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the paper's main table.

    Attributes:
        trainable: patterns over parameter names; `{visual}` and `{text}` stand for the index
            of the last layer of each tower.
        prompts: whether prompts are added to CLIP.
        specific: the source of a frame's own visual prompts: "position" is a table, others are
            modules in `tuning.prompts.GENERATORS`, such as "context"; "" means no such prompts.
        function: whether vision layers after the split layer attend across frames.
        adapter: the part of a block that an adapter is parallel to: "attn", "mlp" or "".
        paper_factors: the paper's way of counting, for `partition.parameter_count`.
    """

    trainable: tuple[str, ...]
    prompts: bool = False
    specific: str = ""
    function: bool = False
    adapter: str = ""
    paper_factors: tuple[tuple[str, int], ...] = _CLIP_FACTORS


def _vop(specific: str = "", function: bool = False) -> Method:
    return Method((r"prompts/.*",), True, specific, function, paper_factors=_PROMPT_FACTORS)


METHODS: dict[str, Method] = {
    "zero_shot": Method(trainable=()),
    "full": Method(trainable=(r"clip/.*",)),
    "bias": Method(trainable=(r"clip/.*/bias",)),
    # Here the paper does count the bare projections.
    "proj": Method(
        trainable=(r"clip/visual/proj/kernel", r"clip/text/text_projection/kernel"),
        paper_factors=(),
    ),
    "partial": Method(
        trainable=(
            r"clip/visual/transformer/resblocks\.{visual}/.*",
            r"clip/text/transformer/resblocks\.{text}/.*",
        )
    ),
    "adapter_attn": Method(trainable=(r"adapters/.*",), adapter="attn"),
    "adapter_ffn": Method(trainable=(r"adapters/.*",), adapter="mlp"),
    "vop": _vop(),
    "vop_p": _vop("position"),
    "vop_c": _vop("context"),
    "vop_f": _vop(function=True),
    "vop_f+p": _vop("position", function=True),
    "vop_f+c": _vop("context", function=True),
}

BRANCHES = {"both": ("visual", "text"), "visual": ("visual",), "text": ("text",)}


@dataclasses.dataclass(frozen=True)
class MethodConfig(MethodSection):
    """A method and the sizes of its prompts: the config's section `method`, and F.

    Attributes:
        frames: F, the frames of a clip; the config's `data.frames`.
    """

    frames: int = DataSection.frames

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
        if self.name not in METHODS:
            raise UserError(f"method.name={self.name!r}: allowed are {', '.join(METHODS)}")
        for field in dataclasses.fields(self):
            key = KEYS[f"data.{field.name}" if field.name == "frames" else f"method.{field.name}"]
            key.check(f"method.{field.name}", getattr(self, field.name))
        if self.first_layer < 1 or 0 < self.last_layer < self.first_layer:
            raise UserError(
                f"method.first_layer={self.first_layer}, last_layer={self.last_layer}: layers "
                "count from 1, the last (0: the deepest) is not before the first"
            )
        if self.parts.specific and self.specific_prompts > self.visual_prompts:
            raise UserError(
                f"method.specific_prompts={self.specific_prompts}: at most all "
                f"method.visual_prompts={self.visual_prompts} can be specific to a frame"
            )
        if self.parts.prompts and not self.visual_tokens + self.text_tokens:
            raise UserError(
                f"method.name={self.name}: no prompt token in branches={self.branches}; raise "
                "visual_prompts, text_prefix or text_suffix, or use zero_shot"
            )

    @property
    def parts(self) -> Method:
        """What the method is composed of."""
        return METHODS[self.name]

    def has_branch(self, tower: str) -> bool:
        """Whether something is added to the tower `visual` or `text`."""
        return tower in BRANCHES[self.branches]

    @property
    def visual_tokens(self) -> int:
        """P of the vision tower; 0 without its branch."""
        return self.visual_prompts if self.parts.prompts and self.has_branch("visual") else 0

    @property
    def specific_tokens(self) -> int:
        """How many of a frame's P prompts are its own; the others are generic."""
        if not self.parts.specific or self.updates_cls:
            return 0
        return min(self.specific_prompts, self.visual_tokens)

    @property
    def updates_cls(self) -> bool:
        """Whether the context updates CLS tokens instead of generating prompts (an ablation)."""
        generated = self.parts.specific not in ("", "position") and self.has_branch("visual")
        return generated and self.cmm_role == "cls"

    @property
    def text_tokens(self) -> int:
        """P of the text tower; 0 without its branch."""
        on = self.parts.prompts and self.has_branch("text")
        return self.text_prefix + self.text_suffix if on else 0

    def layers(self, depth: int) -> range:
        """The layers, from 0, of a tower of `depth` layers that get prompts or adapters."""
        last = min(self.last_layer or depth, depth)
        return range(self.first_layer - 1, last)

    def resolved_split_layer(self, depth: int) -> int:
        """The first vision layer, from 0, that attends across frames; `depth` if none does."""
        if not self.parts.function or not self.has_branch("visual"):
            return depth
        return depth * 2 // 3 if self.split_layer == -1 else self.split_layer

    def text_slots(self, clip: ClipConfig) -> int:
        """T, the token slots of a caption: CLIP's context length without the prompts."""
        return clip.context_length - self.text_tokens

    @property
    def takes_fewer_slots(self) -> bool:
        """Whether captions may come without the slots that are empty in all of them."""
        return self.suffix == "eot" or not self.text_tokens

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
        if self.parts.function and self.split_layer > depth["visual"]:
            raise UserError(
                f"method.split_layer={self.split_layer}: this CLIP has {depth['visual']} vision "
                f"layers; allowed are 0 to {depth['visual']}, or -1 for two thirds of them"
            )
        if self.text_slots(clip) < 3:
            raise UserError(
                f"method.text_prefix + text_suffix = {self.text_tokens}: at most "
                f"{clip.context_length - 3} of {clip.context_length} positions can be prompts"
            )

    def check_frames(self, count: int) -> None:
        """Raises UserError when clips have other than the F frames that tables have rows for."""
        if count != self.frames:
            raise UserError(
                f"clips of {count} frames, but the prompts know {self.frames} frame positions; "
                f"give {self.frames} frames, or have the prompts interpolated when they are loaded"
            )

    def trainable_patterns(self, clip: ClipConfig) -> tuple[str, ...]:
        """The patterns of the trained parameters in the tree {clip, prompts, adapters}."""
        last = {"{visual}": clip.vision_layers - 1, "{text}": clip.text_layers - 1}
        patterns = self.parts.trainable
        for placeholder, index in last.items():
            patterns = tuple(p.replace(placeholder, str(index)) for p in patterns)
        return patterns


def method_of(config: ConfigDict) -> MethodConfig:
    """The config's method, with F of the config's `data.frames`."""
    return MethodConfig.from_mapping({**config.method.to_dict(), "frames": config.data.frames})
