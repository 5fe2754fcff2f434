"""Softmax attention of long sequences on a TPU, in one piece: jax's own kernel (Pallas).

Across the frames of a clip (`vop_f` …) a sequence has F times as many tokens, and the weights of
all queries at once are the largest arrays of a step. The kernel never has more than a tile of
them. What it wants is lengths that tiles divide: here queries and keys are filled up.
"""

import jax
import jax.numpy as jnp

LANES = 128  # of a TPU's registers: a tile's sides are multiples of it
LONGEST = 640  # side of a tile


def tile(length: int) -> int:
    """The side of a tile: the fewest tiles of `LONGEST` at most, and these as small as can be."""
    tiles = -(-length // LONGEST)
    return -(-length // (tiles * LANES)) * LANES


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`attention.attention` without a mask.

    Args:
        query: [N, T, H, K].
        key, value: [N, S, H, K].
        interpret: run the kernel as plain JAX, which any device can.

    Returns:
        [N, T, H, K].
    """
    # Not every platform's jaxlib has what it needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, length, heads, width), count, dtype = query.shape, key.shape[1], query.dtype
    rows, columns = tile(length), tile(count)
    query = _filled(query * width**-0.5, rows)
    key, value = _filled(key, columns), _filled(value, columns)
    queries, keys = query.shape[2], key.shape[2]
    sizes = splash.BlockSizes(
        block_q=rows,
        block_q_dkv=rows,
        block_q_dq=rows,
        block_kv=columns,
        block_kv_dkv=columns,
        block_kv_dq=columns,
    )
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # What fills the keys up is another segment, which no query looks at, those that fill up
    # included: one that looked at nothing would have no softmax.
    there = (jnp.arange(keys) < count).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.ones(queries, jnp.int32), there)
    out = jax.vmap(lambda q, k, v: attend(q, k, v, segment_ids=segments))(query, key, value)
    return out.swapaxes(1, 2)[:, :length].astype(dtype)


def _filled(x: jax.Array, side: int) -> jax.Array:
    """[N, T, H, K] -> [N, H, T', K], zeros up to a multiple of `side`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % side), (0, 0), (0, 0))).swapaxes(1, 2)
