"""Attention is that of jax.nn, at once and over blocks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.kernels.attention import (
    KeyValues,
    attention,
    attention_in_blocks,
    concatenate,
)
from vop_jax.clip.layers import Attention, Block, PromptTokens, take_queries


def qkv(dtype=jnp.float32, length=13):
    rows = np.random.default_rng(0).normal(0, 2, (3, 2, length, 2, 4))
    return tuple(jnp.asarray(x, dtype) for x in rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 6e-2)])
def test_values_and_gradients_are_those_of_jax(causal, dtype, atol):
    q, k, v = qkv(dtype)
    mask = jnp.tril(jnp.ones((13, 13), bool)) if causal else None

    def gradients(attend):
        def value(*x):
            out = attend(*x)
            assert out.dtype == dtype
            return (out.astype(jnp.float32) * jnp.arange(4.0)[None, None, None]).sum(), out

        return jax.tree.map(
            lambda x: np.asarray(x, np.float32),
            jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v),
        )

    ours = gradients(lambda q, *kv: attention(q, KeyValues(*kv, mask)))
    theirs = gradients(lambda *x: jax.nn.dot_product_attention(*x, is_causal=causal))
    scale = max(1.0, *(np.abs(x).max() for x in jax.tree.leaves(theirs)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol * scale), ours, theirs)


def test_large_scores_stay_finite():
    q, k, v = (100 * x for x in qkv())
    np.testing.assert_allclose(
        attention(q, KeyValues(k, v)), jax.nn.dot_product_attention(q, k, v), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_parts_are_looked_at_as_if_they_were_one(shared):
    """Two parts, the second shared by sequences that lie `shared` apart, against one."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 2, shape), jnp.float32)  # noqa: E731
    q, k, v, more = draw(4, 5, 2, 4), draw(4, 5, 2, 4), draw(4, 5, 2, 4), draw(2, shared, 3, 2, 4)
    masks = jnp.tril(jnp.ones((1, 1, 5, 5), bool)), jnp.asarray(rng.random((4, 1, 5, 3)) < 0.5)

    def at_once(q, k, v, more):
        keys, values = concatenate(4, KeyValues(k, v), KeyValues(*more))
        mask = jnp.concatenate([jnp.tile(masks[0], (4, 1, 1, 1)), masks[1]], axis=-1)
        return jax.nn.dot_product_attention(q, keys, values, mask=mask)

    def in_parts(q, k, v, more):
        return attention(q, KeyValues(k, v, masks[0]), KeyValues(*more, masks[1]))

    def result(attend):
        weighed = lambda *x: (attend(*x) * jnp.arange(4.0)[None, None, None]).sum()  # noqa: E731
        return jax.value_and_grad(weighed, argnums=(0, 1, 2, 3))(q, k, v, more)

    ours, theirs = result(in_parts), result(at_once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


def test_joined_parts_repeat_what_is_shared():
    own, shared = jnp.arange(8.0).reshape(4, 2, 1, 1), -jnp.arange(1.0, 3).reshape(2, 1, 1, 1)
    keys, values = concatenate(4, KeyValues(own, own), KeyValues(shared, 2 * shared))
    assert keys[..., 0, 0].tolist() == [[0, 1, -1], [2, 3, -2], [4, 5, -1], [6, 7, -2]]
    assert values[:, 2, 0, 0].tolist() == [-2, -4, -2, -4]


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_beside_a_sequence_are_those_of_a_longer_one_that_nobody_reads(causal):
    """A block of 9 tokens with 2 beside it is one of 11 whose other outputs are dropped."""
    rng = np.random.default_rng(0)
    x, beside = (jnp.asarray(rng.normal(size=(3, n, 8)), jnp.float32) for n in (9, 2))
    block = Block(8, 2, "gelu", causal)
    params = block.init(jax.random.key(0), x)
    seen = jnp.broadcast_to(jnp.arange(9)[None, :, None] >= 4, (3, 9, 2)) if causal else None
    longer = jnp.concatenate([x[:, :4], beside, x[:, 4:]], axis=1)
    whole = block.apply(params, longer)
    expected = jnp.concatenate([whole[:, :4], whole[:, 6:]], axis=1)
    found = block.apply(params, x, prompts=PromptTokens(beside, seen))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    read_alone = block.apply(
        params, x, prompts=PromptTokens(beside, seen), query_positions=jnp.array([8, 0, 4])
    )
    np.testing.assert_allclose(read_alone[:, 0], expected[jnp.arange(3), [8, 0, 4]], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reads", [1, 3, jnp.array([4, 0, 8])])
def test_a_block_makes_only_what_is_read(causal, reads):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 8)), jnp.float32)
    block = Block(8, 2, "gelu", causal)
    params = block.init(jax.random.key(0), x)
    branches = {"attn_branch": lambda h: 0.5 * h, "mlp_branch": lambda h: -h}
    found = block.apply(params, x, **branches, query_positions=reads)
    assert found.shape == (3, reads if isinstance(reads, int) else 1, 8)
    np.testing.assert_allclose(
        found, take_queries(block.apply(params, x, **branches), reads), atol=1e-6
    )


@pytest.mark.parametrize("queries", [1, 4, 13, 128])
def test_values_and_gradients_are_those_of_the_whole(queries):
    def value(attend, q, k, v):
        out = attend(q, k, v)
        return (out * jnp.arange(4.0)[None, None, None]).sum(), out

    def both(attend):
        return jax.jit(jax.grad(lambda *x: value(attend, *x), argnums=(0, 1, 2), has_aux=True))(
            *qkv()
        )

    blocks = both(lambda *x: attention_in_blocks(*x, queries=queries))
    whole = both(jax.nn.dot_product_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), blocks, whole)


def test_gradients_of_bfloat16_keys_are_summed_in_float32():
    q, k, v = qkv(jnp.bfloat16, length=256)

    def gradient(attend, *x):
        return np.asarray(jax.grad(lambda v: attend(x[0], x[1], v).sum())(x[2]), np.float64)

    exact = gradient(jax.nn.dot_product_attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    found = gradient(lambda *x: attention_in_blocks(*x, queries=1), q, k, v)
    # Two roundings to 8 bits; 256 of a running sum would be far off.
    np.testing.assert_allclose(found, exact, rtol=2**-6, atol=1e-2)


def test_the_weights_of_all_queries_never_exist():
    q, k, v = qkv(length=64)
    grad = jax.grad(lambda *x: attention_in_blocks(*x, queries=8).sum(), argnums=(0, 1, 2))
    text = jax.jit(grad).lower(q, k, v).compile().as_text()
    assert "64,64]" not in text
    whole = jax.grad(lambda *x: jax.nn.dot_product_attention(*x).sum(), argnums=(0, 1, 2))
    assert "64,64]" in jax.jit(whole).lower(q, k, v).compile().as_text()


def test_a_causal_layer_has_no_blocks():
    with pytest.raises(ValueError, match="no mask"):
        Attention(8, 2, causal=True).init(jax.random.key(0), jnp.zeros((1, 3, 8)), kernel="blocks")
