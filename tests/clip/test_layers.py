"""Activations, the block's parameters, and what it computes in which type."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.layers import ACTIVATIONS, Attention, Block, Mlp

WIDTH, HEADS, TOKENS = 12, 3, 5
FORMULAS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


def rows():
    return np.random.default_rng(0).normal(0, 1, (2, TOKENS, WIDTH)).astype(np.float32)


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


def test_parameter_names_and_shapes_are_scenics():
    shapes = jax.eval_shape(Block(WIDTH, HEADS, "gelu").init, jax.random.key(0), rows())["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, shapes)
    head, norm = WIDTH // HEADS, {"scale": (WIDTH,), "bias": (WIDTH,)}
    qkv = {"kernel": (WIDTH, HEADS, head), "bias": (HEADS, head)}
    out = {"kernel": (HEADS, head, WIDTH), "bias": (WIDTH,)}
    c_fc = {"kernel": (WIDTH, 4 * WIDTH), "bias": (4 * WIDTH,)}
    c_proj = {"kernel": (4 * WIDTH, WIDTH), "bias": (WIDTH,)}
    assert shapes == {
        "ln_1": norm,
        "attn": {"query": qkv, "key": qkv, "value": qkv, "out": out},
        "ln_2": norm,
        "mlp": {"c_fc": c_fc, "c_proj": c_proj},
    }


@pytest.mark.parametrize("module", [Attention(WIDTH, HEADS), Mlp(WIDTH, "gelu")])
def test_modules_compute_in_their_dtype_over_float32_parameters(module):
    rng, shapes = np.random.default_rng(1), jax.eval_shape(module.init, jax.random.key(0), rows())
    params = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)
    exact = np.asarray(jax.jit(module.apply)(params, rows()))
    half = module.clone(dtype=jnp.bfloat16)
    rounded: Any = jax.jit(half.apply)(params, rows())
    assert rounded.dtype == jnp.bfloat16
    error = abs(np.asarray(rounded, np.float32) - exact).max() / abs(exact).max()
    assert 0 < error < 0.05
