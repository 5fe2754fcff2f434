"""Activations, what the backward pass keeps, and types; other tests compare features."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.layers import ACTIVATIONS, Attention, Mlp

FORMULAS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas(name):
    x = np.linspace(-5, 5, 41)
    out = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, FORMULAS[name](x), atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_keeps_one_wide_array_for_its_backward_pass(activation):
    mlp, x = Mlp(8, activation), jnp.ones((2, 3, 8))
    params = jax.eval_shape(mlp.init, jax.random.key(0), x)
    vjp = lambda params, x: jax.vjp(lambda x: mlp.apply(params, x), x)[1]  # noqa: E731
    residuals = jax.tree.leaves(jax.eval_shape(vjp, params, x))
    assert sum(leaf.shape == (2, 3, 32) for leaf in residuals) == 1


@pytest.mark.parametrize("module", [Attention(12, 3), Mlp(12, "gelu")])
def test_modules_compute_in_their_dtype_over_float32_parameters(module):
    half, x = module.clone(dtype=jnp.bfloat16), jnp.ones((2, 5, 12))
    out, params = jax.eval_shape(half.init_with_output, jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_quick_gelu_and_its_gradient_are_rounded_once_in_bfloat16():
    x = jnp.linspace(-8, 8, 1001, dtype=jnp.bfloat16)
    gradient = jax.vmap(jax.grad(ACTIVATIONS["quick_gelu"]))
    for function in (ACTIVATIONS["quick_gelu"], gradient):
        exact = function(x.astype(jnp.float32))
        assert function(x).dtype == jnp.bfloat16
        # 1e-6: near a zero, the tanh of large numbers has fewer digits.
        np.testing.assert_allclose(function(x).astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
