"""How PyTorch checkpoints name and lay out a CLIP, and how each tensor becomes ours and back.

One table of rules, complete on both sides: every tensor of a checkpoint has a rule or is listed
as ignored, and the rules fill every parameter of `clip.model.Clip`.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vop_jax.clip.weights import check_shapes, parameter_shapes
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.storage.tensors import Tree, flatten, unflatten

Shape = tuple[int, ...]


class Move(NamedTuple):
    """From a PyTorch tensor to our parameter of a given shape, and back."""

    source_shape: Callable[[Shape], Shape]  # ours -> PyTorch's
    convert: Callable[[np.ndarray, Shape], np.ndarray]
    back: Callable[[np.ndarray, Shape], np.ndarray]


def _transposed(x: np.ndarray, shape: Shape) -> np.ndarray:
    """The transpose of a matrix, or of one whose rows or columns are cut into heads."""
    return x.reshape(shape[::-1]).T


SAME = Move(lambda s: s, lambda x, s: x, lambda x, s: x)
TRANSPOSE = Move(lambda s: s[::-1], lambda x, s: x.T, _transposed)  # [out, in] -> [in, out]
IMAGE_KERNEL = Move(  # [D, C, h, w] -> [h, w, C, D]
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda x, s: x.transpose(2, 3, 1, 0),
    lambda x, s: x.transpose(3, 2, 0, 1),
)
# [D, D] -> [D, H, D/H], and its bias [D] -> [H, D/H]
TO_HEADS = Move(lambda s: (s[1] * s[2], s[0]), lambda x, s: x.T.reshape(s), _transposed)
TO_HEADS_BIAS = Move(lambda s: (s[0] * s[1],), lambda x, s: x.reshape(s), lambda x, s: x.reshape(s))
# [D, D] -> [H, D/H, D]
FROM_HEADS = Move(lambda s: (s[2], s[0] * s[1]), lambda x, s: x.T.reshape(s), _transposed)

# The tensors of a module: (PyTorch's ending, ours, move).
BARE = (("", "", SAME),)
RIGHT_FACTOR = (("", "/kernel", SAME),)  # a matrix used as x @ matrix
PROJECTION = ((".weight", "/kernel", TRANSPOSE),)
EMBEDDING = ((".weight", "/embedding", SAME),)
POSITIONS = ((".weight", "", SAME),)
CONV = ((".weight", "/kernel", IMAGE_KERNEL),)
NORM = ((".weight", "/scale", SAME), (".bias", "/bias", SAME))
DENSE = ((".weight", "/kernel", TRANSPOSE), (".bias", "/bias", SAME))
QKV = ((".weight", "/kernel", TO_HEADS), (".bias", "/bias", TO_HEADS_BIAS))
PACKED_QKV = (("_weight", "/kernel", TO_HEADS), ("_bias", "/bias", TO_HEADS_BIAS))
OUT = ((".weight", "/kernel", FROM_HEADS), (".bias", "/bias", SAME))


Tensors = dict[str, np.ndarray]
Row = tuple[str, str, tuple[tuple[str, str, Move], ...]]  # (PyTorch's module, ours, tensors)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one family of checkpoints.

    Attributes:
        ends: modules outside of the blocks.
        block: modules of a block. Where ours are several, joined by "+", PyTorch's tensor
            holds them one after the other.
        blocks: what stands before the index of a block, by tower.
        ignored: patterns of tensors that hold no parameter of the model.
    """

    name: str
    ends: tuple[Row, ...]
    block: tuple[Row, ...]
    blocks: Mapping[str, str]
    ignored: tuple[str, ...]


OPENAI = Layout(
    "OpenAI's and open_clip's",
    ends=(
        ("logit_scale", "logit_scale", BARE),
        ("visual.conv1", "visual/conv1", CONV),
        ("visual.class_embedding", "visual/class_embedding", BARE),
        ("visual.positional_embedding", "visual/positional_embedding", BARE),
        ("visual.ln_pre", "visual/ln_pre", NORM),
        ("visual.ln_post", "visual/ln_post", NORM),
        ("visual.proj", "visual/proj", RIGHT_FACTOR),
        ("token_embedding", "text/token_embedding", EMBEDDING),
        ("positional_embedding", "text/positional_embedding", BARE),
        ("ln_final", "text/ln_final", NORM),
        ("text_projection", "text/text_projection", RIGHT_FACTOR),
    ),
    block=(
        ("ln_1", "ln_1", NORM),
        ("attn.in_proj", "attn/query+attn/key+attn/value", PACKED_QKV),
        ("attn.out_proj", "attn/out", OUT),
        ("ln_2", "ln_2", NORM),
        ("mlp.c_fc", "mlp/c_fc", DENSE),
        ("mlp.c_proj", "mlp/c_proj", DENSE),
    ),
    blocks={"visual": "visual.transformer.resblocks.", "text": "transformer.resblocks."},
    # See `check_constants`.
    ignored=(r"input_resolution|context_length|vocab_size", r"attn_mask"),
)

HUGGING_FACE = Layout(
    "Hugging Face's",
    ends=(
        ("logit_scale", "logit_scale", BARE),
        ("vision_model.embeddings.patch_embedding", "visual/conv1", CONV),
        ("vision_model.embeddings.class_embedding", "visual/class_embedding", BARE),
        ("vision_model.embeddings.position_embedding", "visual/positional_embedding", POSITIONS),
        ("vision_model.pre_layrnorm", "visual/ln_pre", NORM),  # their spelling
        ("vision_model.post_layernorm", "visual/ln_post", NORM),
        ("visual_projection", "visual/proj", PROJECTION),
        ("text_model.embeddings.token_embedding", "text/token_embedding", EMBEDDING),
        ("text_model.embeddings.position_embedding", "text/positional_embedding", POSITIONS),
        ("text_model.final_layer_norm", "text/ln_final", NORM),
        ("text_projection", "text/text_projection", PROJECTION),
    ),
    block=(
        ("layer_norm1", "ln_1", NORM),
        ("self_attn.q_proj", "attn/query", QKV),
        ("self_attn.k_proj", "attn/key", QKV),
        ("self_attn.v_proj", "attn/value", QKV),
        ("self_attn.out_proj", "attn/out", OUT),
        ("layer_norm2", "ln_2", NORM),
        ("mlp.fc1", "mlp/c_fc", DENSE),
        ("mlp.fc2", "mlp/c_proj", DENSE),
    ),
    blocks={"visual": "vision_model.encoder.layers.", "text": "text_model.encoder.layers."},
    ignored=(r"(vision_model|text_model)\.embeddings\.position_ids",),
)


class Rule(NamedTuple):
    """One PyTorch tensor, the parameters that it fills, and how."""

    source: str
    targets: tuple[str, ...]
    move: Move

    def source_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """PyTorch's shape, given all of ours."""
        shape = self.move.source_shape(shapes[self.targets[0]])
        count = len(self.targets)
        return (count * shape[0], *shape[1:]) if count > 1 else shape


def layout_of(tensors: Mapping[str, Any]) -> Layout:
    """The layout that the names speak of: Hugging Face's, else that of everybody else."""
    face = any(name.startswith(HUGGING_FACE.blocks["visual"]) for name in tensors)
    return HUGGING_FACE if face else OPENAI


def expand(rows: tuple[Row, ...], source: str = "", target: str = "") -> list[Rule]:
    """The rules of a table's rows, `source` and `target` put before their names."""
    return [
        Rule(
            source + module + ending,
            tuple(f"{target}{name}{our_ending}" for name in ours.split("+")),
            move,
        )
        for module, ours, tensors in rows
        for ending, our_ending, move in tensors
    ]


def rules_of(layout: Layout, config: ClipConfig) -> list[Rule]:
    """The rules of all tensors of a CLIP of these sizes."""
    rules = expand(layout.ends)
    for tower, layers in (("visual", config.vision_layers), ("text", config.text_layers)):
        for i in range(layers):
            ours = f"{tower}/transformer/resblocks.{i}/"
            rules += expand(layout.block, f"{layout.blocks[tower]}{i}.", ours)
    return rules


def count_blocks(layout: Layout, tower: str, tensors: Mapping[str, Any]) -> int:
    """How many blocks of a tower have a name; at least 1, so that none are found missing."""
    pattern = re.compile(re.escape(layout.blocks[tower]) + r"(\d+)\.")
    return max(1, len({match[1] for name in tensors if (match := pattern.match(name))}))


def read_sizes(where: str | os.PathLike, tensors: Tensors, layout: Layout) -> dict[str, int]:
    """The fields of `ClipConfig` that tensors show: all but heads and activation.

    Raises:
        UserError: a tensor that shows a size is missing or cannot be right.
    """
    if not any(name.startswith(layout.blocks["visual"]) for name in tensors):
        allowed = " or ".join(f"{x.blocks['visual']}… ({x.name})" for x in (OPENAI, HUGGING_FACE))
        raise UserError(
            f"{where}: no tensor is named {allowed}, as in a CLIP with a ViT; the first is named "
            f"{min(tensors)}"
        )
    rows = {rule.targets[0]: rule for rule in expand(layout.ends)}
    for tower, start in layout.blocks.items():
        for rule in expand(layout.block, f"{start}0.", f"{tower}/0/"):
            rows[rule.targets[0]] = rule

    def shape(target: str, rank: int) -> Shape:
        source = rows[target].source
        if source not in tensors:
            raise UserError(f"{where}: tensor {source} is missing")
        found = tensors[source].shape
        if len(found) != rank or not all(found):
            raise UserError(f"{where}: tensor {source} has shape {found}, expected {rank} axes")
        return found

    patch = shape("visual/conv1/kernel", 4)[-1]
    positions = shape("visual/positional_embedding", 2)[0]
    side = round((positions - 1) ** 0.5)
    if side < 1 or side**2 + 1 != positions:
        raise UserError(
            f"{where}: tensor {rows['visual/positional_embedding'].source} has {positions} "
            "positions, expected one more than a square"
        )
    projection = shape("visual/proj/kernel", 2)
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "vision_width": shape("visual/ln_post/scale", 1)[0],
        "vision_layers": count_blocks(layout, "visual", tensors),
        "vision_mlp": shape("visual/0/mlp/c_fc/bias", 1)[0],
        "text_width": shape("text/ln_final/scale", 1)[0],
        "text_layers": count_blocks(layout, "text", tensors),
        "text_mlp": shape("text/0/mlp/c_fc/bias", 1)[0],
        "embed_dim": projection[0 if layout is HUGGING_FACE else 1],
        "context_length": shape("text/positional_embedding", 2)[0],
        "vocab_size": shape("text/token_embedding/embedding", 2)[0],
    }


def check_constants(where: str | os.PathLike, tensors: Tensors, sizes: Mapping[str, int]) -> None:
    """Raises UserError unless the tensors that hold no parameter have the values they must have.

    They are sizes, which OpenAI's archives state, the causal mask, and positions 0, 1, 2, ….
    """
    length = sizes["context_length"]
    expected: dict[str, Any] = {
        "input_resolution": sizes["image_size"],
        "context_length": length,
        "vocab_size": sizes["vocab_size"],
        "attn_mask": np.triu(np.full((length, length), -np.inf), 1),
        "text_model.embeddings.position_ids": np.arange(length)[None],
        "vision_model.embeddings.position_ids": np.arange(
            (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1
        )[None],
    }
    for name in expected.keys() & tensors.keys():
        found = tensors[name]
        if name == "attn_mask":  # some have the least float for infinity
            found = np.where(found <= -1e4, -np.inf, found)
        if not np.array_equal(found, expected[name]):
            raise UserError(f"{where}: tensor {name} is not as in a CLIP of these sizes")


def to_flax(
    where: str | os.PathLike, tensors: Tensors, layout: Layout, config: ClipConfig
) -> dict[str, Any]:
    """The parameter tree of `clip.model.Clip`, float32; empties `tensors` to save memory.

    Raises:
        UserError: a tensor is missing, misshapen, unexpected, or not of finite real numbers.
    """
    rules = rules_of(layout, config)
    for rule in rules:
        if rule.source not in tensors:
            raise UserError(f"{where}: tensor {rule.source} is missing")
    known = {rule.source for rule in rules}
    unexpected = sorted(
        name
        for name in tensors.keys() - known
        if not any(re.fullmatch(pattern, name) for pattern in layout.ignored)
    )
    if unexpected:
        raise UserError(
            f"{where}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all) for a "
            f"CLIP with a ViT in {layout.name} layout"
        )
    shapes = parameter_shapes(config)
    params: dict[str, np.ndarray] = {}
    for rule in rules:
        tensor = tensors.pop(rule.source)
        if rule.source == "logit_scale" and tensor.shape == (1,):  # in some of open_clip's
            tensor = tensor[0]
        check_tensor(where, rule.source, tensor, rule.source_shape(shapes))
        count = len(rule.targets)
        parts = np.split(tensor, count) if count > 1 else [tensor]
        for target, part in zip(rule.targets, parts, strict=True):
            params[target] = np.asarray(
                rule.move.convert(part, shapes[target]), np.float32, order="C"
            )
    tree = unflatten(params)
    check_shapes(where, tree, shapes)
    return tree


def from_flax(params: Tree, layout: Layout, config: ClipConfig) -> Tensors:
    """The inverse of `to_flax`: PyTorch's names and shapes, float32."""
    flat = flatten(params)
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    tensors = {}
    for rule in rules_of(layout, config):
        shape = rule.move.source_shape(shapes[rule.targets[0]])
        parts = [rule.move.back(np.asarray(flat[t], np.float32), shape) for t in rule.targets]
        tensor = np.concatenate(parts) if len(parts) > 1 else parts[0]
        tensors[rule.source] = np.array(tensor, order="C")
    return tensors


def check_tensor(where: str | os.PathLike, name: str, tensor: np.ndarray, shape: Shape) -> None:
    """Raises UserError unless `tensor` has this shape and finite real numbers."""
    if tensor.shape != shape:
        raise UserError(f"{where}: tensor {name} has shape {tensor.shape}, expected {shape}")
    if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
        raise UserError(f"{where}: tensor {name} does not hold finite real numbers")
