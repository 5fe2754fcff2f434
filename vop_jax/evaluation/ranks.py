"""Exact ranks, a block of queries at a time; the matrix of all similarities is never made.

Queries and candidates belong to groups; in retrieval a group is one video with its captions.
A candidate of the query's own group is what the query asks for.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# Similarities in memory at once: 16 MB each time they are held, elsewhere 1 GB.
ON_CPU, ON_ACCELERATOR = 2**22, 2**28

# Similarities [B, C] of queries with all candidates -> scores [B, C], made of the similarities
# by a function that is strictly increasing along each row, or by a re-scoring. A pytree, so that
# its arrays are arguments of the compiled programs: `jax.tree_util.Partial(function, arrays…)`.
Score = Callable[[jax.Array], jax.Array]


def _same(similar: jax.Array) -> jax.Array:
    return similar


PLAIN: Score = jax.tree_util.Partial(_same)


def bound(elements: int | None) -> int:
    """Similarities to hold at once: as asked, or as suits the default device."""
    if elements is not None:
        return elements
    return ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR


def own_ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    group_of_query: np.ndarray,
    group_of_candidate: np.ndarray,
    *,
    score: Score = PLAIN,
    elements: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rank of every candidate of each query's own group among those of all other groups.

    rank = 1 + (how many score more) + (how many score the same) / 2

    Args:
        queries: float32 [Q, E].
        candidates: float32 [C, E].
        group_of_query, group_of_candidate: int [Q], [C].
        score: what similarities are ranked by.
        elements: bound on the similarities held at once, see `bound`; one query at least.

    Returns:
        (query int [P], candidate int [P], rank float64 [P]) of all P pairs of one group.

    Raises:
        FloatingPointError: a similarity that is not finite; it would silently rank.
    """
    of_query = np.asarray(group_of_query, np.int32)
    of_candidate = np.asarray(group_of_candidate, np.int32)
    by_group = np.argsort(of_candidate, kind="stable")
    first = np.searchsorted(of_candidate[by_group], of_query, "left")  # [Q], into by_group
    count = np.searchsorted(of_candidate[by_group], of_query, "right") - first
    # Of like counts together: a block costs as much as its query with the most own candidates.
    order = np.argsort(-count, kind="stable")
    columns = np.arange(max(count.max(initial=0), 1))
    placed, groups = jnp.asarray(candidates, jnp.float32), jnp.asarray(of_candidate)
    found = []
    for rows, block in _blocks(queries, len(candidates), elements, order):
        own = columns[None, :] < count[rows, None]  # [b, K]
        at = by_group[np.where(own, first[rows, None] + columns[None, :], 0)]
        twice, finite = _rank_block(
            block,
            placed,
            padded(of_query[rows], len(block)),
            groups,
            padded(at.astype(np.int32), len(block)),
            int(count[rows[0]]),
            score,
        )
        check(finite)
        query = np.broadcast_to(rows[:, None], own.shape)
        found.append((query[own], at[own], 1 + np.asarray(twice)[: len(rows)][own] / 2))
    query, candidate, rank = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return query, candidate, rank


def grouped_ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    group_of_candidate: np.ndarray,
    *,
    score: Score = PLAIN,
    elements: int | None = None,
) -> np.ndarray:
    """The rank of group i for query i, where a group scores as the best of its candidates.

    rank = 1 + (how many groups score more) + (how many others score the same) / 2

    Args:
        queries: float32 [Q, E].
        candidates: float32 [C, E].
        group_of_candidate: int [C], from 0 to Q - 1, each at least once.
        score, elements: as in `own_ranks`.

    Returns:
        float64 [Q].

    Raises:
        FloatingPointError: a similarity that is not finite; it would silently rank.
    """
    placed = jnp.asarray(candidates, jnp.float32)
    groups = jnp.asarray(group_of_candidate, jnp.int32)
    ranks = np.empty(len(queries))
    for rows, block in _blocks(queries, len(candidates), elements):
        own = padded(rows.astype(np.int32), len(block))
        twice, finite = _grouped_block(block, placed, groups, own, score, len(queries))
        check(finite)
        ranks[rows] = 1 + np.asarray(twice)[: len(rows)] / 2
    return ranks


def best_candidates(
    queries: np.ndarray, candidates: np.ndarray, count: int, *, elements: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best candidates of each query, best first: (rows int [Q, K], similarities [Q, K]).

    K is `count` or the number of candidates, if that is less; ties go to the earlier candidate.
    """
    placed = jnp.asarray(candidates, jnp.float32)
    at, similarities = [], []
    for rows, block in _blocks(queries, len(candidates), elements):
        similar, best, finite = _top_block(block, placed, min(count, len(candidates)))
        check(finite)
        at.append(np.asarray(best)[: len(rows)])
        similarities.append(np.asarray(similar)[: len(rows)])
    return np.concatenate(at), np.concatenate(similarities)


def log_sums(
    queries: np.ndarray, candidates: np.ndarray, scale: float, *, elements: int | None = None
) -> jax.Array:
    """Of each candidate: log of the sum over all queries of exp(scale * similarity); [C]."""
    placed = jnp.asarray(candidates, jnp.float32)
    total = jnp.full(len(candidates), -jnp.inf, jnp.float32)
    for rows, block in _blocks(queries, len(candidates), elements):
        total, finite = _log_sum_block(block, placed, len(rows), np.float32(scale), total)
        check(finite)
    return total


def _blocks(
    queries: np.ndarray, candidates: int, elements: int | None, order: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices [b], rows [B, E]): all blocks of one shape, the last filled up with zeros."""
    size = min(max(bound(elements) // max(candidates, 1), 1), len(queries))
    for start in range(0, len(queries), size):
        rows = np.arange(start, min(start + size, len(queries)))
        rows = rows if order is None else order[rows]
        yield rows, padded(np.asarray(queries[rows], np.float32), size)


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def check(finite: jax.Array | bool) -> None:
    if not finite:
        raise FloatingPointError("a similarity is not finite: the embeddings hold NaN or inf")


def _similarities(block: jax.Array, candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
    similar = jnp.matmul(block, candidates.T, precision=jax.lax.Precision.HIGHEST)
    return similar, jnp.isfinite(similar).all()


@jax.jit
def _rank_block(
    block: jax.Array,
    candidates: jax.Array,
    group_of_query: jax.Array,
    group_of_candidate: jax.Array,
    own: jax.Array,
    most: jax.Array,
    score: Score,
) -> tuple[jax.Array, jax.Array]:
    """(twice the rank less one, int32 [B, K], of the first `most` of `own` [B, K]; all finite)."""
    similar, finite = _similarities(block, candidates)
    scores = score(similar)
    targets = jnp.take_along_axis(scores, own, axis=1)
    others = group_of_query[:, None] != group_of_candidate[None, :]
    scores = jnp.where(others, scores, -jnp.inf)  # neither better nor tied

    def rank(k: jax.Array, twice: jax.Array) -> jax.Array:
        target = jax.lax.dynamic_slice_in_dim(targets, k, 1, axis=1)
        above = (scores > target).astype(jnp.int32) + (scores >= target)
        return jax.lax.dynamic_update_slice_in_dim(twice, above.sum(1, keepdims=True), k, axis=1)

    return jax.lax.fori_loop(0, most, rank, jnp.zeros(own.shape, jnp.int32)), finite


@partial(jax.jit, static_argnames="count")
def _grouped_block(
    block: jax.Array,
    candidates: jax.Array,
    groups: jax.Array,
    own: jax.Array,
    score: Score,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """(twice the rank less one, int32 [B], of group `own` [B] among `count`; all finite)."""
    similar, finite = _similarities(block, candidates)
    best = jax.ops.segment_max(score(similar).T, groups, num_segments=count)  # [count, B]
    target = jnp.take_along_axis(best, own[None, :], axis=0)
    above = (best > target).astype(jnp.int32) + (best >= target)
    return above.sum(0) - 1, finite  # less one: the group itself


@partial(jax.jit, static_argnames="count")
def _top_block(
    block: jax.Array, candidates: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    similar, finite = _similarities(block, candidates)
    return *jax.lax.top_k(similar, count), finite


@jax.jit
def _log_sum_block(
    block: jax.Array, candidates: jax.Array, rows: jax.Array, scale: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`total` [C] and the first `rows` rows of the block, added in the logarithm."""
    similar, finite = _similarities(block, candidates)
    real = jnp.arange(len(block)) < rows
    logits = jnp.where(real[:, None], scale * similar, -jnp.inf)
    return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=0)), finite
