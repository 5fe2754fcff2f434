"""The largest inner products, exactly: on the host over a mapped file, or on a GPU or TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

FEW = 2**14  # rows up to which they are gathered (32 MB of 512 floats), not all multiplied
SCORES = 2**25  # at once: 128 MB, the scores of 33 queries with a million rows
TIED = 4096  # nearly tied rows that are compared in float64
ROUNDING = 1e-6  # of the lengths' product; more than float32 loses in a sum of 512
FREE = 0.8  # share of the free device memory that vectors may take


def on_host(
    vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best of some rows, by BLAS on the vectors where they lie.

    Args:
        vectors: float32 [M, E], mapped.
        rows: int64 [N], which of them, in the order that settles ties.
        queries: float32 [Q, E].
        k: N at most.

    Returns:
        (int64 [Q, k] positions in `rows`, float32 [Q, k] scores), best first. Scores are summed
        in float64, so that equal vectors score the same wherever they lie.
    """
    at = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    few = len(rows) <= FEW
    candidates = vectors[rows] if few else vectors
    everything = few or _counts_up(rows, len(vectors))
    step = max(SCORES // max(len(candidates), 1), 1)
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        similar = block @ candidates.T
        for i, query in enumerate(block, start):
            row = similar[i - start]
            at[i], scores[i] = _best(row if everything else row[rows], vectors, rows, query, k)
    return at, scores


def _counts_up(rows: np.ndarray, count: int) -> bool:
    """Whether `rows` are 0, 1, … count - 1."""
    return len(rows) == count and bool((rows == np.arange(count)).all())


def _best(
    similar: np.ndarray, vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and scores of the best k of the similarities [N] of `rows` [N] with one query."""
    last = np.argpartition(similar, len(similar) - k)[len(similar) - k]  # the k-th best
    margin = ROUNDING * float(np.linalg.norm(query) * np.linalg.norm(vectors[rows[last]]))
    near = np.flatnonzero(similar >= similar[last] - margin)
    if len(near) > k + TIED:
        sure = similar[near] > similar[last] + margin
        near = np.sort(np.concatenate([near[sure], near[~sure][: k + TIED - sure.sum()]]))
    exact = np.empty(len(near), np.float32)
    wide = query.astype(np.float64)
    for start in range(0, len(near), TIED):
        part = slice(start, start + TIED)
        exact[part] = np.einsum("ne,e->n", vectors[rows[near[part]]].astype(np.float64), wide)
    order = np.argsort(-exact, kind="stable")[:k]
    return near[order], exact[order]


def place(vectors: np.ndarray, rows: np.ndarray) -> jax.Array | None:
    """Rows of the mapped vectors on the GPU or TPU, in this order; None where the host searches.

    That is where there is none, or it has no room for them (which is said).
    """
    if jax.default_backend() == "cpu" or not len(rows):
        return None
    device = jax.local_devices()[0]
    memory = device.memory_stats() or {}
    size = len(rows) * vectors.shape[1] * vectors.itemsize
    free = memory.get("bytes_limit", size / FREE) - memory.get("bytes_in_use", 0)
    if size > FREE * free:
        logging.warning(
            "search: %.1f GB of vectors do not fit in the %.1f GB that are free on %s; the host "
            "searches",
            size / 1e9,
            free / 1e9,
            device,
        )
        return None
    in_order = vectors if _counts_up(rows, len(vectors)) else vectors[rows]
    return jax.device_put(in_order, device)


def on_device(
    placed: jax.Array, allowed: np.ndarray | None, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `on_host`, among placed vectors [M, E]; ties to the earlier of them.

    Args:
        allowed: int64 positions to which the search is restricted, None for all.
    """
    mask = np.ones(len(placed), bool)
    if allowed is not None:
        mask[:] = False
        mask[allowed] = True
    on = jnp.asarray(mask)
    # Few shapes are compiled: powers of two.
    most = min(_power(k), len(placed))
    step = min(_power(len(queries)), max(SCORES // len(placed), 1))
    at, scores = [], []
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        filled = np.pad(block, [(0, step - len(block)), (0, 0)])
        score, position = _top(placed, on, filled, most)
        at.append(np.asarray(position)[: len(block), :k].astype(np.int64))
        scores.append(np.asarray(score)[: len(block), :k])
    return np.concatenate(at), np.concatenate(scores)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


@partial(jax.jit, static_argnames="count")
def _top(
    placed: jax.Array, mask: jax.Array, block: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    similar = jnp.matmul(block, placed.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(jnp.where(mask[None, :], similar, -jnp.inf), count)
