"""Trained tables with a row for each frame position, and what to do about other frame counts."""

import re
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.storage.tensors import Tree, flatten, unflatten

# (pattern of a parameter's name, its axis F)
FRAME_AXES = (
    (r"prompts/position", 1),  # [L, F, P, D]
    (r"prompts/(context/transformer/)?frame_position", 0),  # [F, D]
)


def check_frames(given: int, trained: int) -> None:
    """Raises UserError when a clip has another number of frames than a table has rows."""
    if given != trained:
        raise UserError(
            f"clips of {given} frames, but the prompts know {trained} frame positions; give "
            f"{trained} frames, or have the prompts interpolated when they are loaded"
        )


def has_frame_tables(params: Tree) -> bool:
    """Whether a trained subtree is bound to one number of frames."""
    return any(_axis(name) is not None for name in flatten(params))


def interpolate_frames(params: Tree, frames: int) -> dict[str, Any]:
    """The same parameters with all tables resampled, linearly in time, to `frames` rows."""
    flat = flatten(params)
    for name, leaf in flat.items():
        axis = _axis(name)
        if axis is not None:
            flat[name] = _resample(np.asarray(leaf), frames, axis)
    return unflatten(flat)


def _axis(name: str) -> int | None:
    return next((axis for pattern, axis in FRAME_AXES if re.fullmatch(pattern, name)), None)


def _resample(table: np.ndarray, frames: int, axis: int) -> np.ndarray:
    # Row j stands for the middle of the j-th of F equal segments of the clip, as in uniform
    # sampling; beyond the first and the last middle the outermost rows hold.
    old = table.shape[axis]
    at = np.clip((np.arange(frames) + 0.5) * old / frames - 0.5, 0, old - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, old - 1)
    share = (at - low).reshape(-1, *[1] * (table.ndim - axis - 1))
    rows = table.take(low, axis) * (1 - share) + table.take(high, axis) * share
    return rows.astype(table.dtype)
