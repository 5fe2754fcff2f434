"""Softmax attention in plain JAX: at once, or for one block of queries at a time."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERIES = 128  # in a block


class Keys(NamedTuple):
    """What queries [N, T, H, K] look at.

    Attributes:
        key, value: [M, S, H, K]; M divides N, and sequence n looks at those of n modulo M.
        mask: bool, broadcast to [N, H, T, S]: who may look at whom.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array | None = None


def attention(query: jax.Array, *parts: Keys) -> jax.Array:
    """Scaled dot-product attention over all parts as if they were one; softmax in float32.

    What many sequences look at is thus neither copied for each nor appended to each one's own.

    Args:
        query: [N, T, H, K].
        parts: at least one.

    Returns:
        [N, T, H, K].
    """
    scores = [_scores(query, part) for part in parts]
    # The maximum cancels out, so it needs no gradient; and the sum divides what comes out, K wide,
    # not the S weights: `jax.nn.dot_product_attention` has one more [N, H, T, S] array each way.
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in scores])
    weights = [jnp.exp(x - jax.lax.stop_gradient(highest)) for x in scores]
    mixed = _sum(_mixed(w, part) for w, part in zip(weights, parts, strict=True))
    total = _sum(w.sum(axis=-1) for w in weights)  # [N, H, T]
    return (mixed / total.swapaxes(1, 2)[..., None]).astype(query.dtype)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _scores(query: jax.Array, part: Keys) -> jax.Array:
    """float32 [N, H, T, S], -inf where nobody may look."""
    groups = query.reshape(-1, part.key.shape[0], *query.shape[1:])  # [N / M, M, T, H, K]
    scores = jnp.einsum("gmthk,mshk->gmhts", groups, part.key, preferred_element_type=jnp.float32)
    scores = scores.reshape(query.shape[0], *scores.shape[2:]) * query.shape[-1] ** -0.5
    return scores if part.mask is None else jnp.where(part.mask, scores, -jnp.inf)


def _mixed(weights: jax.Array, part: Keys) -> jax.Array:
    """Weights [N, H, T, S] -> float32 [N, T, H, K]."""
    groups = weights.astype(part.value.dtype).reshape(-1, part.value.shape[0], *weights.shape[1:])
    mixed = jnp.einsum("gmhts,mshk->gmthk", groups, part.value, preferred_element_type=jnp.float32)
    return mixed.reshape(weights.shape[0], *mixed.shape[2:])


def joined(count: int, *parts: Keys) -> tuple[jax.Array, jax.Array]:
    """All parts' (keys, values), without their masks, for each of `count` sequences."""

    def join(arrays: list[jax.Array]) -> jax.Array:
        own = [jnp.tile(x, (count // x.shape[0], 1, 1, 1)) for x in arrays]
        return jnp.concatenate(own, axis=1) if len(own) > 1 else own[0]

    return join([part.key for part in parts]), join([part.value for part in parts])


def attention_in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, queries: int = QUERIES
) -> jax.Array:
    """`attention` without a mask.

    A block's [N, H, queries, S] weights are computed again in the backward pass: never are there
    more than those, for about a third more products.
    """
    length = query.shape[1]
    queries = min(queries, length)
    count = -(-length // queries)
    # Rows of zeros fill the last block up; what they attend to is cut off, and has no gradient.
    padded = jnp.pad(query, ((0, 0), (0, count * queries - length), (0, 0), (0, 0)))
    blocks = padded.reshape(query.shape[0], count, queries, *query.shape[2:]).swapaxes(0, 1)
    # The gradients of keys and values are sums over the blocks: in float32 from out here.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    def attend(block: jax.Array) -> jax.Array:  # [N, queries, H, K]
        k, v = (x.astype(query.dtype) for x in wide)
        # Computed again, `attention` would need what it divides, one more product.
        return jax.nn.dot_product_attention(block, k, v, implementation="xla")

    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), blocks)
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]
