"""Layer normalisation against NumPy in double precision, its gradients against autodiff's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.clip.kernels.kernels import assert_same, normal
from vop_jax.clip.kernels.layer_norm import EPS, LayerNorm, normalized

WIDTH = 12  # no power of two: the kernel works on 16


@pytest.mark.parametrize(
    ("mean", "scale", "dtype", "rtol", "atol"),
    # A large mean must not cost digits; bfloat16 is rounded to 8 bits once, at the end.
    [(1000, 0.1, jnp.float32, 0, 5e-3), (0, 3, jnp.bfloat16, 2**-8, 1e-6)],
)
def test_statistics_are_float32_and_exact(mean, scale, dtype, rtol, atol):
    x = (mean + normal(2, 5, WIDTH, scale=scale)).astype(dtype)
    norm = LayerNorm(dtype)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    assert out.dtype == dtype
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(axis=-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True) + EPS)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("backward", "shape"),
    [("plain", (2, 5, WIDTH)), *(("interpreted", s) for s in [(1, WIDTH), (3, 1, 16), (9, 40)])],
)
def test_gradients_equal_autodiffs(backward, shape):
    """Of x, which also passes by, scale and bias; rows fill a program of the kernel or do not."""

    def ours(x, scale, bias):
        return normalized(x, scale, bias, jnp.float32, backward)

    def theirs(x, scale, bias):
        norm = nn.LayerNorm(epsilon=EPS, use_fast_variance=False)
        return x, norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    width = shape[-1]
    arguments = normal(*shape, scale=2), normal(width, seed=1), normal(width, seed=2)
    assert_same(ours, theirs, *arguments, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backward", ["plain", "interpreted"])
def test_the_gradient_of_bfloat16_is_rounded_once(backward):
    x, d_out = (normal(8, WIDTH, seed=i, dtype=jnp.bfloat16) for i in range(2))
    scale, bias = normal(WIDTH, seed=2), np.zeros(WIDTH, np.float32)

    def gradient(x, dtype):
        _, transposed = jax.vjp(lambda x: normalized(x, scale, bias, dtype, backward), x)
        return transposed((d_out.astype(x.dtype), d_out.astype(dtype)))[0]

    rounded, exact = gradient(x, jnp.bfloat16), gradient(x.astype(jnp.float32), jnp.float32)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
