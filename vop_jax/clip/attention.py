"""Softmax attention in plain JAX: at once, or for one block of queries at a time."""

import jax
import jax.numpy as jnp

QUERIES = 128  # in a block


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Args:
        query: [N, T, H, K].
        key, value: [N, S, H, K].
        mask: bool, broadcast to [N, H, T, S]: who may look at whom.

    Returns:
        [N, T, H, K].
    """
    scores = jnp.einsum("nthk,nshk->nhts", query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    # The maximum cancels out, so it needs no gradient; and the sum divides what comes out, K wide,
    # not the S weights: `jax.nn.dot_product_attention` has one more [N, H, T, S] array each way.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "nhts,nshk->nthk",
        weights.astype(query.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (mixed / weights.sum(axis=-1).swapaxes(1, 2)[..., None]).astype(query.dtype)


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
