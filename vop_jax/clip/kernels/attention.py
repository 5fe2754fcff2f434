"""Softmax attention in plain JAX: all queries at once, or one block of queries at a time."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vop_jax.clip.kernels import products

QUERIES = 128  # in a block


class KeyValues(NamedTuple):
    """Keys and values that queries [N, T, H, K] attend to.

    Attributes:
        key, value: [M, S, H, K]; M divides N, and sequence n attends to those of n modulo M.
        mask: bool, broadcast to [N, H, T, S]: True where a query attends to a key.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array | None = None


def attention(query: jax.Array, *parts: KeyValues) -> jax.Array:
    """Scaled dot-product attention over all parts as if they were one; softmax in float32.

    Keys and values that many sequences share are thus neither copied nor concatenated.

    Args:
        query: [N, T, H, K].
        parts: at least one.

    Returns:
        [N, T, H, K].
    """
    scores = [_scores(query, part) for part in parts]
    # The maximum cancels out, so it needs no gradient. The sum divides the output, K wide, not the
    # S weights: `jax.nn.dot_product_attention` has one more [N, H, T, S] array each way.
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in scores])
    weights = [jnp.exp(x - jax.lax.stop_gradient(highest)) for x in scores]
    mixed = _sum(_mixed(w, part) for w, part in zip(weights, parts, strict=True))
    total = _sum(w.sum(axis=-1) for w in weights)  # [N, H, T]
    return (mixed / total.swapaxes(1, 2)[..., None]).astype(query.dtype)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _scores(query: jax.Array, part: KeyValues) -> jax.Array:
    """float32 [N, H, T, S], -inf where the mask is False."""
    groups = query.reshape(-1, part.key.shape[0], *query.shape[1:])  # [N / M, M, T, H, K]
    scores = products.einsum("gmthk,mshk->gmhts", groups, part.key, jnp.float32)
    scores = scores.reshape(query.shape[0], *scores.shape[2:]) * query.shape[-1] ** -0.5
    return scores if part.mask is None else jnp.where(part.mask, scores, -jnp.inf)


def _mixed(weights: jax.Array, part: KeyValues) -> jax.Array:
    """Weights [N, H, T, S] -> float32 [N, T, H, K], the weighted sums of values."""
    groups = weights.astype(part.value.dtype).reshape(-1, part.value.shape[0], *weights.shape[1:])
    mixed = products.einsum("gmhts,mshk->gmthk", groups, part.value, jnp.float32)
    return mixed.reshape(weights.shape[0], *mixed.shape[2:])


def concatenate(count: int, *parts: KeyValues) -> tuple[jax.Array, jax.Array]:
    """(keys, values) [N, S, H, K] of all parts, copied for each of `count` = N sequences.

    Masks are left out.
    """

    def tile(arrays: list[jax.Array]) -> jax.Array:
        copies = [jnp.tile(x, (count // x.shape[0], 1, 1, 1)) for x in arrays]
        return jnp.concatenate(copies, axis=1) if len(copies) > 1 else copies[0]

    return tile([part.key for part in parts]), tile([part.value for part in parts])


def attention_in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, queries: int = QUERIES
) -> jax.Array:
    """`attention` without a mask, one block of `queries` queries at a time.

    The backward pass computes a block's [N, H, queries, S] weights again, so no more than those
    exist at a time, for about a third more products.
    """
    length = query.shape[1]
    queries = min(queries, length)
    count = -(-length // queries)
    # Rows of zeros fill the last block; their outputs are dropped and have no gradient.
    padded = jnp.pad(query, ((0, 0), (0, count * queries - length), (0, 0), (0, 0)))
    blocks = padded.reshape(query.shape[0], count, queries, *query.shape[2:]).swapaxes(0, 1)
    # The gradients of keys and values are sums over the blocks, so they are taken in float32.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    def attend(block: jax.Array) -> jax.Array:  # [N, queries, H, K]
        k, v = (x.astype(query.dtype) for x in wide)
        part = KeyValues(k, v)
        # Weights that sum to one: `attention` would also have to compute its numerator again.
        return _mixed(jax.nn.softmax(_scores(block, part)), part).astype(query.dtype)

    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), blocks)
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]
