"""Which frames of a clip are taken."""

import numpy as np

SAMPLINGS = ("uniform", "rand", "linspace", "segments")
# The frame of a segment [a, b) that "uniform" takes, as the released VoP, X-Pool and
# frozen-in-time do. Records and indexes carry it: those without it have the older rule.
UNIFORM_RULE = "(a + b - 1) // 2"
OLDER_RULE = "(a + b) // 2"


def sample_indices(
    count: int, frames: int, sampling: str = "uniform", rng: np.random.Generator | None = None
) -> np.ndarray:
    """F of the frames 0 … count - 1, ascending: int [F].

    - "uniform" (the paper's): the clip is divided into F equal segments, at
      `linspace(0, count, F + 1)` truncated to int; the middle frame of each, `UNIFORM_RULE`.
    - "rand": in training, with `rng`, any frame of each of these segments.
    - "linspace" (CLIP4Clip, over frames stored at 1 a second): `linspace(0, count - 1, F)`, the
      first and the last among them.
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
