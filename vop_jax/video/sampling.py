"""Which frames of a clip are taken."""

import math
from collections.abc import Sequence

import numpy as np

SAMPLINGS = ("uniform", "rand", "linspace", "segments")
# The frame of a segment [a, b) that "uniform" takes, as the released VoP, X-Pool and
# frozen-in-time do. Records store the rule; those without it have the older one.
UNIFORM_RULE = "(a + b - 1) // 2"
OLDER_RULE = "(a + b) // 2"


def sample_indices(
    count: int, frames: int, sampling: str = "uniform", rng: np.random.Generator | None = None
) -> np.ndarray:
    """Indices of the F frames to take of 0 … count - 1, ascending: int [F].

    - "uniform" (the paper's): the clip is divided into F equal segments, at
      `linspace(0, count, F + 1)` truncated to int; the middle frame of each, `UNIFORM_RULE`.
    - "rand": in training, with `rng`, any frame of each of these segments.
    - "linspace" (CLIP4Clip, over frames stored at 1 a second, see `stored_indices`):
      `linspace(0, count - 1, F)`, the first and the last among them.
    - "segments" (TSN): frame `(k + 1/2) count / F`, rounded down; with `rng` any of the
      `count // F` frames from `k (count // F)` on.

    A clip shorter than F gives each of its frames once and then repeats the last ("segments":
    spreads them).
    """
    if count < 1:
        raise ValueError("a clip has at least one frame")
    if sampling == "segments":
        if rng is None or count < frames:
            return ((np.arange(frames) + 0.5) * count / frames).astype(int)
        length = count // frames
        return np.arange(frames) * length + rng.integers(length, size=frames)
    if count < frames:
        return np.minimum(np.arange(frames), count - 1)
    if sampling == "linspace":
        return np.linspace(0, count - 1, frames).astype(int)
    edges = np.linspace(0, count, frames + 1).astype(int)
    low, high = edges[:-1], edges[1:]
    if sampling == "rand" and rng is not None:
        return rng.integers(low, high)
    return (low + high - 1) // 2


def stored_indices(
    times: Sequence[float], start: float, fps: float, sampling: str = "uniform"
) -> list[int]:
    """Indices of the frames to store at `fps` a second: the first of every 1 / fps seconds.

    "linspace" takes those of CLIP4Clip, which counts frames by the file's rate rounded down: at
    1 a second of 29.97 it stores the 1st, 30th, 59th …

    Args:
        times: seconds at which the frames are shown, ascending.
        start: seconds, of the clip's beginning.
    """
    if sampling == "linspace" and fps >= 1 and len(times) > 1 and times[-1] > times[0]:
        # Some files round times to milliseconds: 30 a second must not become 29.
        rate = max(1, int((len(times) - 1) / (times[-1] - times[0]) + 0.02))
        per_second = min(int(fps), rate)
        within = [k * (rate // per_second) for k in range(per_second)]
        seconds = range(0, len(times), rate)
        return [first + k for first in seconds for k in within if first + k < len(times)]
    indices: list[int] = []
    last = -math.inf
    for index, time in enumerate(times):
        number = math.floor((time - start + 1e-6) * fps)
        if not index or number > last:
            indices.append(index)
            last = number
    return indices
