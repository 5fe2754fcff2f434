"""Names and layouts of CLIP's tensors in PyTorch checkpoints, converted in both directions.

A layout is a table, complete on both sides: every tensor of a checkpoint has a row or is one of
`CONSTANTS`, and the rows fill every parameter of `clip.model.Clip`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vop_jax.clip.weights import parameter_shapes
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.storage.files import StrPath
from vop_jax.storage.tensors import Tree, flatten, unflatten

Shape = tuple[int, ...]
Tensors = dict[str, np.ndarray]


class Transform(NamedTuple):
    """A parameter is PyTorch's tensor with its axes permuted, then one axis split into heads.

    Attributes:
        axes: the permutation, as of `np.transpose`; None: the order stays.
        heads: our axis of heads, which PyTorch merges with the next; None: no such axis.
    """

    axes: Shape | None = None
    heads: int | None = None

    def _merged(self, shape: Shape) -> Shape:
        if self.heads is None:
            return shape
        i = self.heads
        return (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :])

    def source_shape(self, shape: Shape) -> Shape:
        """PyTorch's shape of a parameter of our shape."""
        merged = self._merged(shape)
        return merged if self.axes is None else tuple(merged[i] for i in np.argsort(self.axes))

    def convert(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """PyTorch's tensor -> our parameter of this shape."""
        return (tensor if self.axes is None else tensor.transpose(self.axes)).reshape(shape)

    def invert(self, parameter: np.ndarray) -> np.ndarray:
        """Our parameter -> PyTorch's tensor."""
        merged = parameter.reshape(self._merged(parameter.shape))
        return merged if self.axes is None else merged.transpose(np.argsort(self.axes))


SAME = Transform()
TRANSPOSED = Transform((1, 0))  # [out, in] -> [in, out]
IMAGE_KERNEL = Transform((2, 3, 1, 0))  # [D, 3, h, w] -> [h, w, 3, D]
TO_HEADS = Transform((1, 0), heads=1)  # [H K, D] -> [D, H, K]
HEADS_BIAS = Transform(heads=0)  # [H K] -> [H, K]
FROM_HEADS = Transform((1, 0), heads=0)  # [D, H K] -> [H, K, D]

# The tensors of a module: (PyTorch's ending, ours, transform).
BARE = (("", "", SAME),)
RIGHT_FACTOR = (("", "/kernel", SAME),)  # a matrix used as x @ matrix
PROJECTION = ((".weight", "/kernel", TRANSPOSED),)
EMBEDDING = ((".weight", "/embedding", SAME),)
POSITIONS = ((".weight", "", SAME),)
CONV = ((".weight", "/kernel", IMAGE_KERNEL),)
NORM = ((".weight", "/scale", SAME), (".bias", "/bias", SAME))
DENSE = ((".weight", "/kernel", TRANSPOSED), (".bias", "/bias", SAME))
QKV = ((".weight", "/kernel", TO_HEADS), (".bias", "/bias", HEADS_BIAS))
PACKED_QKV = (("_weight", "/kernel", TO_HEADS), ("_bias", "/bias", HEADS_BIAS))
OUT = ((".weight", "/kernel", FROM_HEADS), (".bias", "/bias", SAME))

# (PyTorch's module, ours, its tensors). Where ours are several, joined by "+", PyTorch's tensor
# holds them one after the other.
ModuleRow = tuple[str, str, tuple[tuple[str, str, Transform], ...]]


class CheckpointLayout(NamedTuple):
    """The names of one family of checkpoints.

    Attributes:
        ends: modules outside of the blocks.
        block: modules of a block.
        blocks: what precedes the index of a block, by tower.
    """

    name: str
    ends: tuple[ModuleRow, ...]
    block: tuple[ModuleRow, ...]
    blocks: Mapping[str, str]


OPENAI = CheckpointLayout(
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
)

HUGGING_FACE = CheckpointLayout(
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
)


class TensorRule(NamedTuple):
    """One PyTorch tensor, the parameters that it fills, and how."""

    source: str
    targets: tuple[str, ...]
    transform: Transform


def layout_of(tensors: Mapping[str, Any]) -> CheckpointLayout:
    """The layout of tensors with these names."""
    prefix = HUGGING_FACE.blocks["visual"]
    return HUGGING_FACE if any(name.startswith(prefix) for name in tensors) else OPENAI


def _expand(rows: tuple[ModuleRow, ...], source: str = "", target: str = "") -> list[TensorRule]:
    """The rules of rows, with `source` and `target` put before the names."""
    return [
        TensorRule(
            f"{source}{module}{ending}",
            tuple(f"{target}{name}{our_ending}" for name in ours.split("+")),
            transform,
        )
        for module, ours, tensors in rows
        for ending, our_ending, transform in tensors
    ]


def rules_of(layout: CheckpointLayout, config: ClipConfig) -> list[TensorRule]:
    """The rules of all tensors of a CLIP of these sizes."""
    rules = _expand(layout.ends)
    for tower, layers in (("visual", config.vision_layers), ("text", config.text_layers)):
        for i in range(layers):
            target = f"{tower}/transformer/resblocks.{i}/"
            rules += _expand(layout.block, f"{layout.blocks[tower]}{i}.", target)
    return rules


# Fields of `ClipConfig`, and "positions", that a parameter's axis shows.
SIZES = {
    "patch_size": ("visual/conv1/kernel", 0),
    "positions": ("visual/positional_embedding", 0),
    "vision_width": ("visual/ln_post/scale", 0),
    "vision_mlp": ("visual/0/mlp/c_fc/bias", 0),
    "embed_dim": ("visual/proj/kernel", 1),
    "text_width": ("text/ln_final/scale", 0),
    "text_mlp": ("text/0/mlp/c_fc/bias", 0),
    "context_length": ("text/positional_embedding", 0),
    "vocab_size": ("text/token_embedding/embedding", 0),
}


def read_sizes(where: StrPath, tensors: Tensors, layout: CheckpointLayout) -> dict[str, int]:
    """The fields of `ClipConfig` that tensors show: all but heads and activation.

    Raises:
        UserError: a tensor that shows a size is missing or has an impossible shape.
    """
    if not any(name.startswith(layout.blocks["visual"]) for name in tensors):
        allowed = " or ".join(f"{x.blocks['visual']}… ({x.name})" for x in (OPENAI, HUGGING_FACE))
        raise UserError(
            f"{where}: no tensor is named {allowed}, as in a CLIP with a ViT; the first is named "
            f"{min(tensors)}"
        )
    expanded = _expand(layout.ends)
    sizes = {}
    for tower, prefix in layout.blocks.items():
        expanded += _expand(layout.block, f"{prefix}0.", f"{tower}/0/")
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        indices = {match[1] for name in tensors if (match := pattern.match(name))}
        field = "vision_layers" if tower == "visual" else "text_layers"
        sizes[field] = max(1, len(indices))  # a tower without blocks lacks block 0
    rules = {rule.targets[0]: rule for rule in expanded}
    for field, (target, axis) in SIZES.items():
        source, _, transform = rules[target]
        if source not in tensors:
            raise UserError(f"{where}: tensor {source} is missing")
        shape = tensors[source].shape
        axis = axis if transform.axes is None else transform.axes[axis]
        if axis >= len(shape) or not all(shape):
            raise UserError(f"{where}: tensor {source} has shape {shape}, which is not CLIP's")
        sizes[field] = shape[axis]
    positions = sizes.pop("positions")
    side = round((positions - 1) ** 0.5)
    if side < 1 or side**2 + 1 != positions:
        raise UserError(
            f"{where}: tensor {rules['visual/positional_embedding'].source} has {positions} "
            "positions, expected one more than a square"
        )
    return sizes | {"image_size": side * sizes["patch_size"]}


# Tensors without parameters, whose values follow from the sizes.
CONSTANTS: dict[str, Callable[[Mapping[str, int]], Any]] = {
    "input_resolution": lambda sizes: sizes["image_size"],
    "context_length": lambda sizes: sizes["context_length"],
    "vocab_size": lambda sizes: sizes["vocab_size"],
    "attn_mask": lambda sizes: np.triu(np.full((sizes["context_length"],) * 2, -np.inf), 1),
    "text_model.embeddings.position_ids": lambda sizes: [range(sizes["context_length"])],
    "vision_model.embeddings.position_ids": lambda sizes: [
        range((sizes["image_size"] // sizes["patch_size"]) ** 2 + 1)
    ],
}


def check_constants(where: StrPath, tensors: Tensors, sizes: Mapping[str, int]) -> None:
    """Raises UserError if one of the tensors in `CONSTANTS` has another value."""
    for name in CONSTANTS.keys() & tensors.keys():
        value = tensors[name]
        if name == "attn_mask":  # some have the lowest float instead of -inf
            value = np.where(value <= -1e4, -np.inf, value)
        if not np.array_equal(value, CONSTANTS[name](sizes)):
            raise UserError(f"{where}: tensor {name} is not as in a CLIP of these sizes")


def to_flax(
    where: StrPath, tensors: Tensors, layout: CheckpointLayout, config: ClipConfig
) -> dict[str, Any]:
    """The parameter tree of `clip.model.Clip`, float32; empties `tensors` to save memory.

    Raises:
        UserError: a tensor is missing, misshapen, unexpected, or not of finite real numbers.
    """
    rules = rules_of(layout, config)
    for rule in rules:
        if rule.source not in tensors:
            raise UserError(f"{where}: tensor {rule.source} is missing")
    if unexpected := sorted(tensors.keys() - CONSTANTS.keys() - {rule.source for rule in rules}):
        raise UserError(
            f"{where}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all) for a "
            f"CLIP with a ViT in {layout.name} layout"
        )
    shapes = parameter_shapes(config)
    params: dict[str, np.ndarray] = {}
    for source, targets, transform in rules:
        tensor = tensors.pop(source)
        if source == "logit_scale" and tensor.shape == (1,):  # in some of open_clip's
            tensor = tensor[0]
        expected = transform.source_shape(shapes[targets[0]])
        if len(targets) > 1:
            expected = (len(targets) * expected[0], *expected[1:])
        check_tensor(where, source, tensor, expected)
        parts = np.split(tensor, len(targets)) if len(targets) > 1 else [tensor]
        for target, part in zip(targets, parts, strict=True):
            parameter = transform.convert(part, shapes[target])
            params[target] = np.asarray(parameter, np.float32, order="C")
    return unflatten(params)


def from_flax(params: Tree, layout: CheckpointLayout, config: ClipConfig) -> Tensors:
    """The inverse of `to_flax`: PyTorch's names and shapes, float32."""
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
    tensors = {}
    for source, targets, transform in rules_of(layout, config):
        parts = [transform.invert(flat[target]) for target in targets]
        tensors[source] = np.array(np.concatenate(parts) if len(parts) > 1 else parts[0], order="C")
    return tensors


def check_tensor(where: StrPath, name: str, tensor: np.ndarray, shape: Shape) -> None:
    """Raises UserError unless `tensor` has this shape and finite real numbers."""
    if tensor.shape != shape:
        raise UserError(f"{where}: tensor {name} has shape {tensor.shape}, expected {shape}")
    if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
        raise UserError(f"{where}: tensor {name} does not hold finite real numbers")
