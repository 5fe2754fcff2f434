"""Attention equals that of jax.nn, at once and in blocks of queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.clip.kernels.kernels import assert_same, normal
from vop_jax.clip.kernels.attention import (
    KeyValues,
    attention,
    attention_in_blocks,
    concatenate,
)
from vop_jax.clip.layers import Attention


def qkv(dtype=jnp.float32, length=13):
    return tuple(normal(2, length, 2, 4, seed=i, scale=2, dtype=dtype) for i in range(3))


def plain(q, k, v):
    return attention(q, KeyValues(k, v))


def causal(q, k, v):
    return attention(q, KeyValues(k, v, jnp.tril(jnp.ones((13, 13), bool))))


@pytest.mark.parametrize(
    ("ours", "dtype", "atol"),
    [
        (plain, jnp.float32, 1e-5),
        (causal, jnp.bfloat16, 6e-2),
        *((functools.partial(attention_in_blocks, queries=n), jnp.float32, 1e-5) for n in (4, 128)),
    ],
)
def test_values_and_gradients_equal_those_of_jax(ours, dtype, atol):
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=ours is causal)
    assert_same(ours, theirs, *qkv(dtype), atol=atol)


def test_large_scores_stay_finite():
    q, k, v = (100 * x for x in qkv())
    expected = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(plain(q, k, v), expected, rtol=1e-4, atol=1e-3)


def test_parts_equal_one_concatenated_sequence():
    """Two parts, the second shared by sequences that are two apart."""
    q, k, v = (normal(4, 5, 2, 4, seed=i, scale=2) for i in range(3))
    extra = normal(2, 2, 3, 2, 4, seed=3, scale=2)
    masks = jnp.tril(jnp.ones((1, 1, 5, 5), bool)), normal(4, 1, 5, 3) < 0

    def as_one(q, k, v, extra):
        keys, values = concatenate(4, KeyValues(k, v), KeyValues(*extra))
        mask = jnp.concatenate([jnp.tile(masks[0], (4, 1, 1, 1)), masks[1]], axis=-1)
        return jax.nn.dot_product_attention(q, keys, values, mask=mask)

    def in_parts(q, k, v, extra):
        return attention(q, KeyValues(k, v, masks[0]), KeyValues(*extra, masks[1]))

    assert_same(in_parts, as_one, q, k, v, extra)


def test_blocks_sum_gradients_of_bfloat16_keys_in_float32():
    q, k, v = qkv(jnp.bfloat16, length=256)

    def gradient(attend, q, k, v):
        return np.asarray(jax.jit(jax.grad(lambda v: attend(q, k, v).sum()))(v), np.float64)

    exact = gradient(jax.nn.dot_product_attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    ours = gradient(functools.partial(attention_in_blocks, queries=1), q, k, v)
    # Two roundings to 8 bits; 256 of a running sum would be far off.
    np.testing.assert_allclose(ours, exact, rtol=2**-6, atol=1e-2)


def test_blocks_never_hold_the_weights_of_all_queries():
    def program(attend):
        grad = jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))
        return str(jax.make_jaxpr(grad)(*qkv(length=64)))

    assert "64,64]" not in program(functools.partial(attention_in_blocks, queries=8))
    assert "64,64]" in program(jax.nn.dot_product_attention)


def test_a_causal_layer_has_no_blocks():
    layer = Attention(8, 2, causal=True)
    init = functools.partial(layer.init, kernel="blocks")
    with pytest.raises(ValueError, match="no mask"):
        jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 3, 8)))
