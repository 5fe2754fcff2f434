"""Ranks of both directions out of one pass over the similarities, a tile at a time.

Of texts and videos by plain similarity, a pair's is one number for both directions: its rank
among the videos of its row, and among the texts of its column. All are found beforehand, near
the diagonal once texts are in the order of their videos; every tile is then compared with those
of its rows and those of its columns, and forgotten.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.evaluation.ranks import bound, check, padded


def pair_ranks(
    texts: np.ndarray, videos: np.ndarray, video_of_text: np.ndarray, *, elements: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Each pair's rank among all videos, and among its own and the texts of other videos.

    rank = 1 + (how many score more) + (how many score the same) / 2

    Args:
        texts, videos: float32 [N, E], [M, E].
        video_of_text: int [N], the row of each text's video; every video has a text.
        elements: bound on the similarities held at once, see `ranks.bound`.

    Returns:
        (float64 [N], float64 [N]), in the order of `texts`.

    Raises:
        FloatingPointError: a similarity that is not finite; it would silently rank.
    """
    high, wide = tile_sizes(len(texts), len(videos), bound(elements))
    # Videos of many texts first: a tile costs as much as its video with the most.
    count = np.bincount(video_of_text, minlength=len(videos))
    by_count = np.argsort(-count, kind="stable")
    columns = jnp.zeros((math.ceil(len(videos) / wide) * wide, videos.shape[1]), jnp.float32)
    for left in range(0, len(videos), wide):  # a second copy of all is too much for the host
        part = np.asarray(videos[by_count[left : left + wide]], np.float32)
        columns = jax.block_until_ready(_put(columns, padded(part, wide), np.int32(left)))
    place = np.empty(len(videos), np.int32)
    place[by_count] = np.arange(len(videos), dtype=np.int32)
    own = place[video_of_text]  # [N], each text's column
    order = np.argsort(own, kind="stable")
    own = own[order]
    count = count[by_count]
    placed_count = jnp.asarray(_whole(count.astype(np.int32), wide))
    first = jnp.asarray(_whole((np.cumsum(count) - count).astype(np.int32), wide))

    def rows_of(start: int) -> tuple[jax.Array, jax.Array]:
        """The tile's texts and their columns, -1 where there is none."""
        at = slice(start, start + high)
        rows = padded(np.asarray(texts[order[at]], np.float32), high)
        mine = np.full(high, -1, np.int32)
        mine[: len(own[at])] = own[at]
        return jnp.asarray(rows), jnp.asarray(mine)

    starts = range(0, len(texts), high)
    targets = []
    for start in starts:  # the columns of a tile's texts are neighbours, and no more than its rows
        rows, mine = rows_of(start)
        near = np.int32(min(own[start], len(columns) - wide))
        targets.append(_own(_tile(rows, columns, near, wide), mine - near))
    all_targets = jnp.concatenate(targets)
    of_rows = []
    of_columns = jnp.zeros(len(all_targets), jnp.int32)  # [N], of each text in its video's column
    before: bool | jax.Array = True
    for start, target in zip(starts, targets, strict=True):
        rows, mine = rows_of(start)
        above = jnp.zeros(high, jnp.int32)
        for left in range(0, len(columns), wide):
            above, of_columns, finite = _count(
                _tile(rows, columns, np.int32(left), wide),
                (mine, target, np.int32(left), np.int32(len(videos))),
                (placed_count, first, all_targets),
                (above, of_columns),
            )
            check(before)  # of the tile before, so that two are held, not all of a row
            before = finite
        of_rows.append(above)
    check(before)
    found = np.empty((2, len(texts)))
    found[:, order] = 1 + np.stack([jnp.concatenate(of_rows), of_columns])[:, : len(texts)] / 2
    return found[0], found[1]


def tile_sizes(texts: int, videos: int, elements: int) -> tuple[int, int]:
    """(high, wide) with high * wide <= elements; not higher than wide, but where wide is all."""
    side = min(math.isqrt(elements), texts)
    wide = min(elements // side, videos)
    return min(elements // wide, texts), wide


def _whole(rows: np.ndarray, size: int) -> np.ndarray:
    """Filled up with zeros to a multiple of `size` rows."""
    return padded(rows, math.ceil(len(rows) / size) * size)


@jax.jit(donate_argnums=0)
def _put(columns: jax.Array, part: jax.Array, left: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(columns, part, left, 0)


@jax.jit(static_argnames="wide")
def _tile(rows: jax.Array, columns: jax.Array, left: jax.Array, wide: int) -> jax.Array:
    """Similarities [high, wide]. One program, so that those of equal rows are equal, to the bit."""
    part = jax.lax.dynamic_slice_in_dim(columns, left, wide)
    return jnp.matmul(rows, part.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _own(similar: jax.Array, at: jax.Array) -> jax.Array:
    """[high], the similarity of each row at `at`."""
    return jnp.take_along_axis(similar, at[:, None], axis=1, mode="clip")[:, 0]


@jax.jit(donate_argnums=3)
def _count(
    similar: jax.Array,
    of_rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    of_columns: tuple[jax.Array, jax.Array, jax.Array],
    found: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds a tile to twice the ranks less one: ([high] of its rows, [N] in columns, all finite)."""
    own, target, left, videos = of_rows
    above, above_in_column = found
    wide = similar.shape[1]
    finite = jnp.isfinite(similar).all()
    at = left + jnp.arange(wide, dtype=jnp.int32)
    others = (own[:, None] != at[None, :]) & (own >= 0)[:, None] & (at < videos)[None, :]
    similar = jnp.where(others, similar, -jnp.inf)  # neither better nor tied

    def twice(target: jax.Array, axis: int) -> jax.Array:
        more = (similar > target).astype(jnp.int32) + (similar >= target)
        return more.sum(axis)

    count, first, all_targets = of_columns
    count, first = (jax.lax.dynamic_slice_in_dim(x, left, wide) for x in (count, first))

    def add(k: jax.Array, above_in_column: jax.Array) -> jax.Array:
        """For the k-th text of each column."""
        more = twice(all_targets[first + k][None, :], 0)
        return above_in_column.at[first + k].add(jnp.where(k < count, more, 0))

    above_in_column = jax.lax.fori_loop(0, count.max(), add, above_in_column)
    return above + twice(target[:, None], 1), above_in_column, finite
