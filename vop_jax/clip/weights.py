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
from vop_jax.clip.model import Clip
from vop_jax.config.clip import ClipConfig, arch_name
from vop_jax.errors import UserError
from vop_jax.storage import tensors
from vop_jax.storage.files import StrPath
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


@functools.cache  # tracing a CLIP takes a second
def parameter_shapes(config: ClipConfig) -> Mapping[str, tuple[int, ...]]:
    """{"visual/conv1/kernel": shape, ...} of a CLIP of these sizes."""
    frames = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.uint8)
    ids = jax.ShapeDtypeStruct((1, config.context_length), np.int32)
    variables = jax.eval_shape(Clip(config).init, jax.random.key(0), frames, ids)
    return types.MappingProxyType({k: v.shape for k, v in flatten(variables["params"]).items()})


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
    tensors.save(path, params, metadata)
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
    metadata = tensors.read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a converted CLIP; convert PyTorch weights with "
            "tools/convert_clip_weights.py"
        )
    params, _ = tensors.load(path)
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
    check_shapes(path, params, parameter_shapes(config))
    if verify or tensors.CHECKSUM not in metadata:
        actual = tensors.fingerprint(params)
        if actual != fingerprint:
            raise UserError(
                f"{path}: its tensors have the fingerprint {actual[:12]}, but its metadata states "
                f"{fingerprint[:12]}; convert it again"
            )
    return ClipWeights(params, config, fingerprint, source)


def check_shapes(where: StrPath, tree: Tree, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError naming the first tensor that is missing, unknown or misshapen."""
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}
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
