"""Exact ranks of captions and videos for each other; the matrix of similarities is never held.

A tile of texts x videos is computed, compared with the scores of the pairs that its rows and its
columns belong to, and dropped: one pass over the similarities ranks both directions.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Similarities in memory at once: an array of them takes 16 MB on a CPU, 1 GB elsewhere.
ON_CPU, ON_ACCELERATOR = 2**22, 2**28

# (similarities, a number of each query, a number of each candidate), shapes that broadcast
ScoreFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Score:
    """A re-scoring of similarities, to rank by in place of them; see `metrics.dual_softmax`.

    Attributes:
        function: computes scores, element by element; it may return anything that orders the
            candidates of each query alike.
        of_query: [Q], its number of each query.
        of_candidate: [C], its number of each candidate.
    """

    function: ScoreFunction
    of_query: np.ndarray
    of_candidate: np.ndarray


def max_elements() -> int:
    """Similarities in memory at once, as many as suit the default device."""
    return ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR


# ---- Tiles of texts x videos, for both directions


class _Side(NamedTuple):
    """Texts or videos of a tile: rows [n, E], and their numbers in both scores, if any."""

    rows: jax.Array
    numbers: tuple[jax.Array, jax.Array] | None


class _Tiles:
    """Videos as columns on the device, texts as rows from the host, a tile at a time.

    Videos of many texts come first: a tile costs as much as its video with the most. Texts are in
    the order of their videos, so the columns of a tile's texts are neighbours.
    """

    def __init__(
        self,
        texts: np.ndarray,
        videos: np.ndarray,
        owner: np.ndarray,
        scores: tuple[Score, Score] | None,
    ):
        self.texts, self.scores = texts, scores
        self.high, self.wide = tile_sizes(len(texts), len(videos), max_elements())
        count = np.bincount(owner, minlength=len(videos))
        by_count = np.argsort(-count, kind="stable")
        place = np.argsort(by_count).astype(np.int32)
        self.order = np.argsort(place[owner], kind="stable")
        self.own = place[owner][self.order]  # [N], each text's column
        self.columns = _columns(videos, by_count, self.wide, scores)
        first = np.cumsum(count[by_count]) - count[by_count]
        self.count, self.first = (
            jnp.asarray(_padded(x.astype(np.int32), len(self.columns.rows)))
            for x in (count[by_count], first)
        )

    def rows(self, start: int) -> tuple[_Side, jax.Array]:
        """A tile's texts and the column of each, -1 behind the last text."""
        at = slice(start, start + self.high)
        numbers = None
        if self.scores is not None:
            both = self.scores[0].of_query, self.scores[1].of_candidate
            first, second = (jnp.asarray(_padded(x[self.order[at]], self.high)) for x in both)
            numbers = first, second
        own = np.full(self.high, -1, np.int32)
        own[: len(self.own[at])] = self.own[at]
        rows = _padded(np.asarray(self.texts[self.order[at]], np.float32), self.high)
        return _Side(jnp.asarray(rows), numbers), jnp.asarray(own)

    def tile(self, texts: _Side, left: np.int32) -> tuple[jax.Array, ...]:
        """See `_tile`."""
        functions = (self.scores[0].function, self.scores[1].function) if self.scores else None
        scores: tuple[jax.Array, ...] = _tile(texts, self.columns, left, self.wide, functions)
        return scores


def pair_ranks(
    texts: np.ndarray,
    videos: np.ndarray,
    owner: np.ndarray,
    *,
    scores: tuple[Score, Score] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Each text's rank of its video, and its own for its video among texts of other videos.

    rank = 1 + (how many score more) + (how many others score the same) / 2

    Args:
        texts: float32 [N, E].
        videos: float32 [M, E].
        owner: int [N], the row of each text's video; every video has a text.
        scores: re-scorings to rank by, text to video and video to text; None: similarity.

    Returns:
        (float64 [N], float64 [N]), in the order of `texts`.

    Raises:
        FloatingPointError: a similarity is not finite; it would rank without a sign of it.
    """
    tiles = _Tiles(texts, videos, owner, scores)
    starts, wide, end = range(0, len(texts), tiles.high), tiles.wide, len(tiles.columns.rows)
    row_targets, column_targets = [], []
    for start in starts:
        side, own = tiles.rows(start)
        left = np.int32(min(tiles.own[start], end - wide))
        tile = tiles.tile(side, left)
        row_targets.append(_own_scores(tile[0], own - left))
        column_targets.append(_own_scores(tile[-1], own - left))
    of_columns = tiles.count, tiles.first, jnp.concatenate(column_targets)
    twice_of_rows, twice_of_columns = [], jnp.zeros(len(of_columns[-1]), jnp.int32)
    previous_finite: bool | jax.Array = True
    for start, target in zip(starts, row_targets, strict=True):
        side, own = tiles.rows(start)
        twice = jnp.zeros(tiles.high, jnp.int32)
        for left in map(np.int32, range(0, end, wide)):
            of_rows = own, target, left, np.int32(len(videos))
            twice, twice_of_columns, finite = _count(
                tiles.tile(side, left), of_rows, of_columns, (twice, twice_of_columns)
            )
            _check_finite(previous_finite)  # waits one tile late: two are in memory, not a row
            previous_finite = finite
        twice_of_rows.append(twice)
    _check_finite(previous_finite)
    ranks = np.empty((2, len(texts)))
    both = np.stack([jnp.concatenate(twice_of_rows), twice_of_columns])
    ranks[:, tiles.order] = 1 + both[:, : len(texts)] / 2
    return ranks[0], ranks[1]


def tile_sizes(texts: int, videos: int, elements: int) -> tuple[int, int]:
    """(high, wide) with high * wide <= elements; not higher than wide, unless all videos fit."""
    side = min(math.isqrt(elements), texts)
    wide = min(elements // side, videos)
    return min(elements // wide, texts), wide


def _columns(
    videos: np.ndarray, order: np.ndarray, wide: int, scores: tuple[Score, Score] | None
) -> _Side:
    """All videos [M, E] on the device in this order, padded with zeros to a multiple of `wide`."""
    count = math.ceil(len(videos) / wide) * wide
    rows = jnp.zeros((count, videos.shape[1]), jnp.float32)
    for left in range(0, len(videos), wide):  # a second copy of all is too much for the host
        part = np.asarray(videos[order[left : left + wide]], np.float32)
        rows = _put(rows, _padded(part, wide), np.int32(left)).block_until_ready()
    if scores is None:
        return _Side(rows, None)
    both = scores[0].of_candidate, scores[1].of_query
    first, second = (jnp.asarray(_padded(x[order], count)) for x in both)
    return _Side(rows, (first, second))


@partial(jax.jit, donate_argnums=0)
def _put(columns: jax.Array, part: jax.Array, left: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(columns, part, left, 0)


@partial(jax.jit, static_argnames=("wide", "functions"))
def _tile(
    texts: _Side,
    videos: _Side,
    left: jax.Array,
    wide: int,
    functions: tuple[ScoreFunction, ScoreFunction] | None,
) -> tuple[jax.Array, ...]:
    """Scores [high, wide] of text to video and of video to text; one array if they are the same.

    One program, so that scores of equal rows are equal, to the bit.
    """
    part = jax.lax.dynamic_slice_in_dim(videos.rows, left, wide)
    similar = jnp.matmul(texts.rows, part.T, precision=jax.lax.Precision.HIGHEST)
    if functions is None or texts.numbers is None or videos.numbers is None:
        return (similar,)
    of_text = [x[:, None] for x in texts.numbers]
    of_video = [jax.lax.dynamic_slice_in_dim(x, left, wide)[None, :] for x in videos.numbers]
    return (
        functions[0](similar, of_text[0], of_video[0]),
        functions[1](similar, of_video[1], of_text[1]),
    )


@jax.jit
def _own_scores(tile: jax.Array, own: jax.Array) -> jax.Array:
    """[high], the score of each row in its own column."""
    return jnp.take_along_axis(tile, own[:, None], axis=1, mode="clip")[:, 0]


@partial(jax.jit, donate_argnums=3)
def _count(
    tile: tuple[jax.Array, ...],
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    columns: tuple[jax.Array, jax.Array, jax.Array],
    twice: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds a tile to twice the ranks less one: (of its rows [high], in columns [N], all finite).

    Args:
        tile: of `_tile`.
        rows: each row's own column and its score there [high], the tile's first column, M.
        columns: how many texts each column has and the first of them [M], the scores of all [N].
    """
    own, row_targets, left, videos = rows
    count, first, column_targets = columns
    of_rows, of_columns = twice
    wide = tile[0].shape[1]
    finite = jnp.isfinite(tile[0]).all()
    at = left + jnp.arange(wide, dtype=jnp.int32)
    others = (own[:, None] != at[None, :]) & (own >= 0)[:, None] & (at < videos)[None, :]
    # An own pair is neither better than itself nor tied.
    text_to_video, video_to_text = (jnp.where(others, x, -jnp.inf) for x in (tile[0], tile[-1]))

    def count_better(scores: jax.Array, target: jax.Array, axis: int) -> jax.Array:
        return ((scores > target).astype(jnp.int32) + (scores >= target)).sum(axis)

    count, first = (jax.lax.dynamic_slice_in_dim(x, left, wide) for x in (count, first))

    def add(k: jax.Array, of_columns: jax.Array) -> jax.Array:
        """For the k-th text of each column."""
        better = count_better(video_to_text, column_targets[first + k][None, :], 0)
        return of_columns.at[first + k].add(jnp.where(k < count, better, 0))

    of_columns = jax.lax.fori_loop(0, count.max(), add, of_columns)
    return of_rows + count_better(text_to_video, row_targets[:, None], 1), of_columns, finite


# ---- Blocks of queries x all candidates


def grouped_ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    group_of_candidate: np.ndarray,
    *,
    score: Score | None = None,
) -> np.ndarray:
    """The rank of group i for query i, where a group scores as the best of its candidates.

    Args:
        queries: float32 [Q, E].
        candidates: float32 [C, E].
        group_of_candidate: int [C], from 0 to Q - 1, each at least once.
        score: a re-scoring to rank by; None: similarity.

    Returns:
        float64 [Q].

    Raises:
        FloatingPointError: a similarity is not finite.
    """
    placed = jnp.asarray(candidates, jnp.float32)
    groups = jnp.asarray(group_of_candidate, jnp.int32)
    ranks = np.empty(len(queries))
    for rows, block in _blocks(queries, len(candidates)):
        own = _padded(rows.astype(np.int32), len(block))
        numbers, function = None, None
        if score is not None:
            numbers = _padded(score.of_query[rows], len(block)), score.of_candidate
            function = score.function
        twice, finite = _grouped_block(block, placed, groups, own, numbers, function, len(queries))
        _check_finite(finite)
        ranks[rows] = 1 + np.asarray(twice)[: len(rows)] / 2
    return ranks


def best_candidates(
    queries: np.ndarray, candidates: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best candidates of each query, best first: (rows int [Q, K], similarities [Q, K]).

    K is `count` or the number of candidates, if that is less; ties go to the earlier candidate.
    """
    placed = jnp.asarray(candidates, jnp.float32)
    best, similarities = [], []
    for rows, block in _blocks(queries, len(candidates)):
        similar, at, finite = _top_block(block, placed, min(count, len(candidates)))
        _check_finite(finite)
        best.append(np.asarray(at)[: len(rows)])
        similarities.append(np.asarray(similar)[: len(rows)])
    return np.concatenate(best), np.concatenate(similarities)


def log_sums(queries: np.ndarray, candidates: np.ndarray, scale: float) -> jax.Array:
    """Of each candidate: log of the sum over all queries of exp(scale * similarity); [C]."""
    placed = jnp.asarray(candidates, jnp.float32)
    total = jnp.full(len(candidates), -jnp.inf, jnp.float32)
    for rows, block in _blocks(queries, len(candidates)):
        total, finite = _log_sum_block(block, placed, len(rows), np.float32(scale), total)
        _check_finite(finite)
    return total


def _blocks(queries: np.ndarray, candidates: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices [b], rows [B, E]): all blocks of one shape, the last filled up with zeros."""
    size = min(max(max_elements() // max(candidates, 1), 1), len(queries))
    for start in range(0, len(queries), size):
        rows = np.arange(start, min(start + size, len(queries)))
        yield rows, _padded(np.asarray(queries[rows], np.float32), size)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """[n, …] -> [size, …], zeros at the end."""
    return np.pad(rows, [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def _check_finite(finite: jax.Array | bool) -> None:
    if not finite:
        raise FloatingPointError("a similarity is not finite: the embeddings hold NaN or inf")


def _similarities(block: jax.Array, candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [B, E] and [C, E] -> (similarities [B, C], whether all are finite)."""
    similar = jnp.matmul(block, candidates.T, precision=jax.lax.Precision.HIGHEST)
    return similar, jnp.isfinite(similar).all()


@partial(jax.jit, static_argnames=("function", "count"))
def _grouped_block(
    block: jax.Array,
    candidates: jax.Array,
    groups: jax.Array,
    own: jax.Array,
    numbers: tuple[jax.Array, jax.Array] | None,
    function: ScoreFunction | None,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """(twice the rank less one, int32 [B], of group `own` [B] among `count`; all finite)."""
    scores, finite = _similarities(block, candidates)
    if function is not None and numbers is not None:
        scores = function(scores, numbers[0][:, None], numbers[1][None, :])
    best = jax.ops.segment_max(scores.T, groups, num_segments=count)  # [count, B]
    target = jnp.take_along_axis(best, own[None, :], axis=0)
    better = (best > target).astype(jnp.int32) + (best >= target)
    return better.sum(0) - 1, finite  # less one: the group itself


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
