"""Softmax attention whose weights exist for one block of queries at a time; plain JAX."""

import jax
import jax.numpy as jnp

QUERIES = 128  # in a block


def attention_in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, queries: int = QUERIES
) -> jax.Array:
    """`jax.nn.dot_product_attention` without a mask, [N, T, H, K] each, on any platform.

    A block's [N, H, queries, T] weights are computed again in the backward pass: never are there
    more than those, for about a third more products.
    """
    count, length = -(-query.shape[1] // queries), query.shape[1]
    # Rows of zeros fill the last block up; what they attend to is cut off, and has no gradient.
    padded = jnp.pad(query, ((0, 0), (0, count * queries - length), (0, 0), (0, 0)))
    blocks = padded.reshape(query.shape[0], count, queries, *query.shape[2:]).swapaxes(0, 1)
    # The gradients of keys and values are sums over the blocks: in float32 from out here.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    def attend(block: jax.Array) -> jax.Array:  # [N, queries, H, K]
        k, v = (x.astype(query.dtype) for x in wide)
        return jax.nn.dot_product_attention(block, k, v, implementation="xla")

    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), blocks)
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]
