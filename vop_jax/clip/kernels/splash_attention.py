"""Softmax attention of long sequences on a TPU: jax's own splash attention (Pallas).

Across the frames of a clip (`vop_f` …) a sequence has F times as many tokens, and the weights of
all queries together are the largest arrays of a step. The kernel keeps one tile of them at a time.
It needs lengths that are multiples of a tile, so queries and keys are padded here.
"""

import jax
import jax.numpy as jnp

LANES = 128  # of a TPU's registers; the sides of a tile are multiples of it
LONGEST = 640  # the largest side of a tile


def tile(length: int) -> int:
    """The side of a tile: as few tiles as `LONGEST` allows, each as small as possible."""
    tiles = -(-length // LONGEST)
    return -(-length // (tiles * LANES)) * LANES


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`attention.attention` without a mask.

    Args:
        query: [N, T, H, K].
        key, value: [N, S, H, K].
        interpret: runs the kernel as plain JAX, on any device.

    Returns:
        [N, T, H, K].
    """
    # Not every platform's jaxlib has what the kernel needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, length, heads, width), count, dtype = query.shape, key.shape[1], query.dtype
    rows, columns = tile(length), tile(count)
    query = _padded(query * width**-0.5, rows)
    key, value = _padded(key, columns), _padded(value, columns)
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
    # Padding keys are a segment that no query attends to. Padding queries attend to the real keys:
    # a query without any key would have no softmax.
    key_segments = (jnp.arange(keys) < count).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.ones(queries, jnp.int32), key_segments)
    out = jax.vmap(lambda q, k, v: attend(q, k, v, segment_ids=segments))(query, key, value)
    return out.swapaxes(1, 2)[:, :length].astype(dtype)


def _padded(x: jax.Array, side: int) -> jax.Array:
    """[N, T, H, K] -> [N, H, T', K], padded with zeros to a multiple of `side`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % side), (0, 0), (0, 0))).swapaxes(1, 2)
