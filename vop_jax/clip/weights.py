"""A converted CLIP on disk: one self-describing safetensors file."""

import dataclasses
import functools
import json
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.clip.layers import ACTIVATIONS
from vop_jax.config.clip import ClipConfig, arch_name
from vop_jax.errors import UserError
from vop_jax.storage import hub, tensors
from vop_jax.storage.files import StrPath, is_remote
from vop_jax.storage.tensors import Tree, flatten, unflatten

FORMAT = "vop_jax.clip"


@dataclasses.dataclass(frozen=True)
class ClipWeights:
    """A CLIP read from a file.

    Attributes:
        params: the parameter tree of `clip.model.Clip`, float32.
        config: its sizes and activation.
        fingerprint: SHA-256 of the parameters, see `tensors.fingerprint`.
        source: name of the file it was converted from, for people.
    """

    params: dict[str, Any]
    config: ClipConfig
    fingerprint: str
    source: str

    @property
    def name(self) -> str:
        """The name in messages: architecture, source, first digits of the fingerprint."""
        return f"{arch_name(self.config)} from {self.source} ({self.fingerprint[:12]})"


class ClipFile:
    """A file written by `save_clip`, of which a tower is read only if something needs it.

    A file without checksums of its parts (of an older version) or in a bucket is read at once.

    Attributes:
        path, config, fingerprint, name: of the file and of its CLIP, see `ClipWeights`.

    Raises:
        UserError: as `load_clip` does, except for what is in the towers.
    """

    def __init__(self, path: StrPath):
        path = hub.local_file(path, hub.CLIP_FILE)
        self.path, self._whole = path, None
        metadata = _read_metadata(path)
        if tensors.has_part_checksums(metadata) and not is_remote(path):
            about = ClipWeights({}, *_parse_metadata(path, metadata))
            check_shapes(path, tensors.read_shapes(path), parameter_shapes(about.config))
        else:
            about = load_clip(path)
            self._whole = about.params
        self.config, self.fingerprint, self.name = about.config, about.fingerprint, about.name

    def take(self, tower: str) -> dict[str, Any]:
        """The parameters of a tower, "visual" or "text", and of no tower; once for each tower.

        Raises:
            UserError: the file has changed, or a number is not finite.
        """
        if self._whole is not None:
            return {tower: self._whole.pop(tower), "logit_scale": self._whole["logit_scale"]}
        parts = (tensors.load_part(self.path, part) for part in (tower, "logit_scale"))
        return unflatten({name: leaf for part in parts for name, leaf in part.items()})


@functools.cache
def parameter_shapes(config: ClipConfig) -> Mapping[str, tuple[int, ...]]:
    """{"visual/conv1/kernel": shape, ...} of a CLIP of these sizes, sorted by name.

    They are written out because tracing a `Clip` takes a second, which each query would wait for.
    """
    c, width, text_width = config, config.vision_width, config.text_width
    shapes = {
        "logit_scale": (),
        "visual/conv1/kernel": (c.patch_size, c.patch_size, 3, width),
        "visual/class_embedding": (width,),
        "visual/positional_embedding": (c.patches + 1, width),
        **_dense("visual/ln_pre/scale", width),
        **_dense("visual/ln_post/scale", width),
        "visual/proj/kernel": (width, c.embed_dim),
        "text/token_embedding/embedding": (c.vocab_size, text_width),
        "text/positional_embedding": (c.context_length, text_width),
        **_dense("text/ln_final/scale", text_width),
        "text/text_projection/kernel": (text_width, c.embed_dim),
    }
    for i in range(c.vision_layers):
        block = f"visual/transformer/resblocks.{i}"
        shapes |= _block_shapes(block, width, c.vision_heads, c.vision_mlp)
    for i in range(c.text_layers):
        block = f"text/transformer/resblocks.{i}"
        shapes |= _block_shapes(block, text_width, c.text_heads, c.text_mlp)
    return types.MappingProxyType(dict(sorted(shapes.items())))


def _block_shapes(
    block: str, width: int, heads: int, hidden: int | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a `layers.Block`."""
    hidden, head = hidden or 4 * width, width // heads
    shapes = _dense(f"{block}/attn/out/kernel", heads, head, width)
    for name in ("query", "key", "value"):
        shapes[f"{block}/attn/{name}/kernel"] = (width, heads, head)
        shapes[f"{block}/attn/{name}/bias"] = (heads, head)
    for name in ("ln_1", "ln_2"):
        shapes |= _dense(f"{block}/{name}/scale", width)
    shapes |= _dense(f"{block}/mlp/c_fc/kernel", width, hidden)
    return shapes | _dense(f"{block}/mlp/c_proj/kernel", hidden, width)


def _dense(weights: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's weights and of its bias, which has the last axis."""
    return {weights: shape, f"{weights.rpartition('/')[0]}/bias": shape[-1:]}


def save_clip(
    path: StrPath, params: Tree, config: ClipConfig, *, source: str, source_sha256: str
) -> str:
    """Writes a CLIP in float32, atomically, and returns its fingerprint."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(params))
    fingerprint = tensors.fingerprint(params)
    metadata = {
        "format": FORMAT,
        "arch": arch_name(config),
        "activation": config.activation,
        "config": json.dumps(config.to_dict()),
        "source": source,
        "source_sha256": source_sha256,
        "fingerprint": fingerprint,
    }
    tensors.save(path, params, metadata, part_checksums=True)
    return fingerprint


def load_clip(path: StrPath, *, verify: bool = False) -> ClipWeights:
    """Reads a CLIP written by `save_clip`.

    Args:
        verify: computes the fingerprint again; by default the file's checksum is enough, and only
            files without one are fingerprinted.

    Raises:
        UserError: the file is missing, of another kind or damaged, or a tensor is missing,
            unknown, not finite or of the wrong shape.
    """
    path = hub.local_file(path, hub.CLIP_FILE)
    metadata = _read_metadata(path)
    params, _ = tensors.load(path)
    config, fingerprint, source = _parse_metadata(path, metadata)
    check_shapes(path, params, parameter_shapes(config))
    if verify or tensors.CHECKSUM not in metadata:
        actual = tensors.fingerprint(params)
        if actual != fingerprint:
            raise UserError(
                f"{path}: its tensors have the fingerprint {actual[:12]}, but its metadata states "
                f"{fingerprint[:12]}; convert it again"
            )
    return ClipWeights(params, config, fingerprint, source)


def _read_metadata(path: StrPath) -> dict[str, str]:
    metadata = tensors.read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a converted CLIP; convert PyTorch weights with "
            "tools/convert_clip_weights.py"
        )
    return metadata


def _parse_metadata(path: StrPath, metadata: Mapping[str, str]) -> tuple[ClipConfig, str, str]:
    """(config, fingerprint, source)."""
    try:
        config = ClipConfig(**json.loads(metadata["config"]))
        for name, size in config.to_dict().items():
            if name == "activation" or (size is None and name in ("vision_mlp", "text_mlp")):
                continue
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r}: not a whole number of 1 or more")
        fingerprint, source = metadata["fingerprint"], metadata["source"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata is not a converted CLIP's ({error!r})") from None
    if config.activation not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise UserError(f"{path}: activation {config.activation!r} is not one of {allowed}")
    return config, fingerprint, source


def check_shapes(where: StrPath, tree: Tree, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError naming the first tensor that is missing, unknown or misshapen.

    Args:
        tree: of arrays or of shapes.
    """
    shapes = {name: tuple(getattr(leaf, "shape", leaf)) for name, leaf in flatten(tree).items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise UserError(f"{where}: tensor {name} is missing")
        if shapes[name] != tuple(shape):
            raise UserError(f"{where}: tensor {name} has shape {shapes[name]}, expected {shape}")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise UserError(f"{where}: unknown tensor {unknown[0]} ({len(unknown)} in all)")


# Whether a frozen parameter is cast to the compute dtype where it is used, by the first pattern
# that matches its name. If so, it can be stored in that dtype: half the memory, the same result.
CAST_AT_USE: list[tuple[str, bool]] = [
    (r".*/ln_\w+/(scale|bias)", False),  # a norm scales its float32 statistics in float32
    (r".*/(kernel|bias|embedding)", True),
    (r".*/(class|positional)_embedding", True),
    (r".*", False),  # logit_scale
]


def cast_frozen(frozen: Tree, dtype: Any) -> dict[str, Any]:
    """The frozen tree, arrays or shapes, with what `CAST_AT_USE` allows cast to `dtype`."""

    def cast(name: str, leaf: Any) -> Any:
        if not next(cast for pattern, cast in CAST_AT_USE if re.fullmatch(pattern, name)):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=jnp.dtype(dtype))
        return leaf.astype(jnp.dtype(dtype))

    return unflatten({name: cast(name, leaf) for name, leaf in flatten(frozen).items()})
