"""Layer normalisation against NumPy in double precision, its gradients against autodiff's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.kernels.layer_norm import EPS, LayerNorm, normalized

WIDTH = 12  # no power of two: the kernel works on 16


def drawn(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def exact(x):
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)


def fresh(dtype, x):
    norm = LayerNorm(dtype)
    return norm.apply(norm.init(jax.random.key(0), x), x)


def test_it_keeps_digits_beside_a_large_mean():
    x = 1000 + drawn(2, 5, WIDTH, scale=0.1)
    np.testing.assert_allclose(fresh(jnp.float32, x), exact(x), atol=5e-3)


def test_bfloat16_has_float32_statistics():
    x = jnp.asarray(drawn(2, 5, WIDTH, scale=3), jnp.bfloat16)
    got = fresh(jnp.bfloat16, x)
    assert got.dtype == jnp.bfloat16
    # One rounding to 8 bits at the end, no more.
    np.testing.assert_allclose(np.asarray(got, np.float64), exact(x), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("backward", ["plain", "interpreted"])
@pytest.mark.parametrize("shape", [(2, 5, WIDTH), (1, WIDTH), (3, 1, 16), (9, 40)])
def test_gradients_are_autodiffs(backward, shape):
    """Of x, which also passes by, scale and bias; rows that fill a program of the kernel or not."""
    x, scale, bias = drawn(*shape, scale=2), drawn(shape[-1], seed=1), drawn(shape[-1], seed=2)
    weights = drawn(2, *shape, seed=3)

    def ours(x, scale, bias):
        return normalized(x, scale, bias, jnp.float32, backward)

    def theirs(x, scale, bias):
        norm = nn.LayerNorm(epsilon=EPS, use_fast_variance=False)
        return x, norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    def result(of):
        def value(*arguments):
            passed, out = of(*arguments)
            return (weights[0] * passed**2).sum() + (weights[1] * out**2).sum()

        return jax.value_and_grad(value, argnums=(0, 1, 2))(x, scale, bias)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4),
        result(ours),
        result(theirs),
    )


@pytest.mark.parametrize("backward", ["plain", "interpreted"])
def test_the_gradient_of_bfloat16_is_rounded_once(backward):
    x, given = (jnp.asarray(drawn(8, WIDTH, seed=i), jnp.bfloat16) for i in range(2))
    scale, bias = drawn(WIDTH, seed=2), np.zeros(WIDTH, np.float32)

    def gradient(x, dtype):
        _, transposed = jax.vjp(lambda x: normalized(x, scale, bias, dtype, backward), x)
        return transposed((given.astype(x.dtype), given.astype(dtype)))[0]

    got, expected = gradient(x, jnp.bfloat16), gradient(x.astype(jnp.float32), jnp.float32)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)
