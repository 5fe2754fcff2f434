"""A trained prompt set on disk: saving, loading, checking, frame tables and the released layout.

A prompt set is a safetensors file, or an orbax folder of the same content. It names the CLIP that
it was trained over and works with no other.
"""

import dataclasses
import hashlib
import json
import os
import re
from typing import Any

import jax
import numpy as np
from etils import epath

from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.storage import hub, tensors
from vop_jax.storage.tensors import Tree, flatten, unflatten
from vop_jax.tuning.methods import MethodConfig

FORMAT = "vop_jax.prompts"
# Keys of the config's section `data` that say how clips are read.
VIDEO_KEYS = ("frames", "sampling", "short_side", "stored_fps", "folder_fps")
# Parameters with one row per frame position: (pattern of the name, axis F).
FRAME_TABLES = (
    (r"prompts/position", 1),  # [L, F, P, D]
    (r"prompts/(context/transformer/)?frame_position", 0),  # [F, D]
)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """A trained prompt set: the content of a file of prompts.

    Attributes:
        params: the trained subtree, e.g. {"prompts": {"visual": [L, P, D], "text": …}}.
        method: the method and its sizes.
        clip_fingerprint, clip_name: the CLIP they were trained over.
        clip_config: its sizes.
        video: how clips were read in training: `VIDEO_KEYS`, some of them or {}.
    """

    params: dict[str, Any]
    method: MethodConfig
    clip_fingerprint: str
    clip_name: str
    clip_config: ClipConfig
    video: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over parameters, method and the way clips are read."""
        facts = [dataclasses.asdict(self.method), self.video, tensors.fingerprint(self.params)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_prompts(path: str | os.PathLike[str], prompts: PromptSet) -> None:
    """Writes a prompt set atomically.

    Args:
        path: a safetensors file, or an orbax folder if the name ends in .orbax.
    """
    save = tensors.save_orbax if os.fspath(path).endswith(".orbax") else tensors.save
    save(
        path,
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), prompts.params),
        {
            "format": FORMAT,
            "method": prompts.method.name,
            "method_config": json.dumps(dataclasses.asdict(prompts.method)),
            "clip_fingerprint": prompts.clip_fingerprint,
            "clip_name": prompts.clip_name,
            "clip_config": json.dumps(prompts.clip_config.to_dict()),
            "activation": prompts.clip_config.activation,
            "video": json.dumps(prompts.video),
        },
    )


def load_prompts(path: str | os.PathLike[str]) -> PromptSet:
    """Reads what `save_prompts` wrote.

    Raises:
        UserError: there is no such file, or it is not a prompts file.
    """
    path = hub.local_file(path, hub.PROMPTS_FILE)
    load = tensors.load_orbax if epath.Path(path).is_dir() else tensors.load
    params, metadata = load(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a prompts file; --mode=export writes one")
    try:
        return PromptSet(
            params=params,
            method=MethodConfig.from_mapping(json.loads(metadata["method_config"])),
            clip_fingerprint=metadata["clip_fingerprint"],
            clip_name=metadata["clip_name"],
            clip_config=ClipConfig(**json.loads(metadata["clip_config"])),
            video=dict(json.loads(metadata["video"])),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata is not a prompts file's ({error!r})") from None


def check_same_clip(
    where: str | os.PathLike[str],
    prompts: PromptSet,
    fingerprint: str,
    name: str,
    config: ClipConfig,
) -> None:
    """Raises UserError, naming both, when the prompts were trained over another CLIP.

    The fingerprint covers the parameters; a CLIP with the same parameters but another activation
    or number of heads is another CLIP too.
    """
    if prompts.clip_fingerprint != fingerprint:
        raise UserError(
            f"{where}: prompts were trained over {prompts.clip_name}, not over the given {name}"
        )
    trained_over = prompts.clip_config.to_dict()
    for key, value in config.to_dict().items():
        if trained_over[key] != value:
            raise UserError(
                f"{where}: prompts were trained over a CLIP with {key}={trained_over[key]!r}; "
                f"that of the given {name} is {value!r}"
            )


def has_frame_tables(params: Tree) -> bool:
    """Whether a trained subtree is bound to one number of frames."""
    return any(_frame_axis(name) is not None for name in flatten(params))


def interpolate_frames(params: Tree, frames: int) -> dict[str, Any]:
    """The same parameters with every frame table resampled, linearly in time, to `frames` rows."""
    flat = flatten(params)
    for name, leaf in flat.items():
        axis = _frame_axis(name)
        if axis is not None:
            flat[name] = _resample(np.asarray(leaf), frames, axis)
    return unflatten(flat)


def _frame_axis(name: str) -> int | None:
    return next((axis for pattern, axis in FRAME_TABLES if re.fullmatch(pattern, name)), None)


def _resample(table: np.ndarray, frames: int, axis: int) -> np.ndarray:
    """A table with `frames` rows along the axis, interpolated linearly."""
    # Row j stands for the middle of the j-th of F equal segments of the clip, as in uniform
    # sampling; before the first and after the last middle the outermost rows apply.
    old = table.shape[axis]
    position = np.clip((np.arange(frames) + 0.5) * old / frames - 0.5, 0, old - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = (position - low).reshape(-1, *[1] * (table.ndim - axis - 1))
    rows = table.take(low, axis) * (1 - weight) + table.take(high, axis) * weight
    return np.asarray(rows, table.dtype)


def released_method(visual: int, text: int, prefix: int | None = None) -> MethodConfig:
    """The method of a released checkpoint with these numbers of prompt tokens per layer.

    Args:
        prefix: how many of the text prompts stand before the words; half of them by default.
    """
    prefix = text // 2 if prefix is None else prefix
    return MethodConfig(
        visual_prompts=visual,
        text_prefix=prefix,
        text_suffix=text - prefix,
        suffix="released",
    )


def check_released(method: MethodConfig, clip: ClipConfig) -> None:
    """Raises UserError unless the released code computes the same as `method` over `clip`.

    The message names the settings to train with instead.
    """
    where, text = "--format=pytorch", method.text_prefix + method.text_suffix
    if method.branches != "both" or not (method.visual_prompts and text):
        raise UserError(
            f"{where}: holds prompts of both towers; this method has them in one; train with "
            "--config.method.branches=both and prompts in both towers"
        )
    # A last layer that is the deepest one means the same as 0.
    deepest = max(clip.vision_layers, clip.text_layers)
    last_layer = method.last_layer if method.last_layer < deepest else 0
    ours = dataclasses.asdict(dataclasses.replace(method, last_layer=last_layer))
    theirs = dataclasses.asdict(released_method(method.visual_prompts, text))
    keys = ("name", "suffix", "text_prefix", "text_suffix", "first_layer", "last_layer")
    if different := [key for key in keys if ours[key] != theirs[key]]:
        key = different[0]
        settings = " ".join(f"--config.method.{key}={theirs[key]}" for key in different)
        raise UserError(
            f"{where}: the released code computes method.{key}={theirs[key]!r}, not "
            f"{ours[key]!r}; train with {settings}"
        )
    from vop_jax.clip.convert.source_config import HEAD_WIDTH  # late: only an export needs it

    openai = dataclasses.replace(
        clip,
        activation="quick_gelu",
        vision_heads=max(1, clip.vision_width // HEAD_WIDTH),
        text_heads=max(1, clip.text_width // HEAD_WIDTH),
        vision_mlp=None,
        text_mlp=None,
    )
    for key, value in openai.to_dict().items():
        if (ours := getattr(clip, key)) != value:
            raise UserError(
                f"{where}: the released code has CLIP's {key}={value!r}, not {ours!r}; train over "
                "a CLIP such as OpenAI's"
            )
