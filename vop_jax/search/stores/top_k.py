"""The largest inner products, exactly: on the host over a mapped file, or on a GPU or TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

FEW = 2**14  # rows up to which they are gathered (32 MB of 512 floats) before the product
SCORES = 2**25  # at once: 128 MB, the scores of 33 queries with a million rows
EXACT = 4096  # rows whose scores are summed in float64 at once
ROUNDING = 1e-6  # of the lengths' product; more than float32 loses in a sum of 512
FREE = 0.8  # share of the free device memory that vectors may take


def on_host(
    vectors: np.ndarray, rows: np.ndarray | None, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best rows, by BLAS on the mapped vectors; ties to the smaller row.

    Args:
        vectors: float32 [M, E], mapped.
        rows: int64, sorted, to which the search is restricted; None for all.
        queries: float32 [N, E].
        k: at most the number of rows.

    Returns:
        (int64 [N, k] rows, float32 [N, k] scores), best first. Scores are summed in float64, so
        that equal vectors have equal scores in any place.
    """
    best = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    few = rows is not None and len(rows) <= FEW
    candidates = vectors[rows] if few else vectors
    step = max(SCORES // max(len(candidates), 1), 1)
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        similar = block @ candidates.T
        for i, query in enumerate(block, start):
            row = similar[i - start]
            own = row if few or rows is None else row[rows]
            best[i], scores[i] = _best(own, vectors, rows, query, k)
    return best, scores


def _best(
    similar: np.ndarray, vectors: np.ndarray, rows: np.ndarray | None, query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [k], float32 [k]): the best of `rows` by similarities with a query [E]."""
    last = np.argpartition(similar, len(similar) - k)[len(similar) - k]  # the k-th best
    kth = vectors[last if rows is None else rows[last]]
    margin = ROUNDING * float(np.linalg.norm(query) * np.linalg.norm(kth))
    near = np.flatnonzero(similar >= similar[last] - margin)
    near = near if rows is None else rows[near]
    exact = np.empty(len(near), np.float32)
    wide = query.astype(np.float64)
    for start in range(0, len(near), EXACT):
        part = slice(start, start + EXACT)
        exact[part] = np.einsum("me,e->m", vectors[near[part]].astype(np.float64), wide)
    order = np.argsort(-exact, kind="stable")[:k]
    return near[order], exact[order]


def place(vectors: np.ndarray) -> jax.Array | None:
    """The vectors on the GPU or TPU; None without one, or with a warning where they do not fit."""
    if jax.default_backend() == "cpu" or not len(vectors):
        return None
    device = jax.local_devices()[0]
    memory = device.memory_stats() or {}
    size = vectors.nbytes
    free = memory.get("bytes_limit", size / FREE) - memory.get("bytes_in_use", 0)
    if size > FREE * free:
        sizes = f"{size / 1e9:.1f} GB of vectors do not fit in the {free / 1e9:.1f} GB"
        logging.warning("search: %s that are free on %s; the host searches", sizes, device)
        return None
    return jax.device_put(vectors, device)


def on_device(
    placed: jax.Array, rows: np.ndarray | None, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `on_host`, among placed vectors [M, E]."""
    allowed = np.full(len(placed), rows is None)
    if rows is not None:
        allowed[rows] = True
    mask = jnp.asarray(allowed)
    # Powers of two, so that few shapes are compiled.
    most = min(_power_of_two(k), len(placed))
    step = min(_power_of_two(len(queries)), max(SCORES // len(placed), 1))
    best, scores = [], []
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        filled = np.pad(block, [(0, step - len(block)), (0, 0)])
        score, position = _top(placed, mask, filled, most)
        best.append(np.asarray(position)[: len(block), :k].astype(np.int64))
        scores.append(np.asarray(score)[: len(block), :k])
    return np.concatenate(best), np.concatenate(scores)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@partial(jax.jit, static_argnames="count")
def _top(
    placed: jax.Array, mask: jax.Array, block: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    similar = jnp.matmul(block, placed.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(jnp.where(mask[None, :], similar, -jnp.inf), count)
