"""The block against the same maths in NumPy, double precision."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.layers import ACTIVATIONS, Attention, Block, Mlp

WIDTH, HEADS, TOKENS = 12, 3, 5
ERF = np.vectorize(math.erf)
REFERENCE = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
}


def rows(seed=0):
    return np.random.default_rng(seed).normal(0, 1, (2, TOKENS, WIDTH)).astype(np.float32)


def random_params(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)


def norm(x, p):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def attention(x, p, causal):
    def project(name):
        return np.einsum("ntd,dhk->nhtk", x, p[name]["kernel"]) + p[name]["bias"][None, :, None]

    logits = project("query") @ project("key").swapaxes(-1, -2) / math.sqrt(WIDTH / HEADS)
    if causal:
        logits = np.where(np.tri(TOKENS, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = weights @ project("value")
    return np.einsum("nhtk,hkd->ntd", mixed, p["out"]["kernel"]) + p["out"]["bias"]


def mlp(x, p, activation):
    h = REFERENCE[activation](x @ p["c_fc"]["kernel"] + p["c_fc"]["bias"])
    return h @ p["c_proj"]["kernel"] + p["c_proj"]["bias"]


@pytest.mark.parametrize("branches", [(0, 0), (3, -2)])
@pytest.mark.parametrize(("activation", "causal"), [("gelu", False), ("quick_gelu", True)])
def test_a_block_equals_its_formula(activation, causal, branches):
    """Branches get the normalised input of attention and MLP; their outputs are added."""
    x, block = rows(), Block(WIDTH, HEADS, activation, causal)
    params = random_params(block, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = norm(x.astype(np.float64), p["ln_1"])
    expected = x + attention(h, p["attn"], causal) + branches[0] * h
    h = norm(expected, p["ln_2"])
    expected = expected + mlp(h, p["mlp"], activation) + branches[1] * h
    functions = [lambda h, factor=factor: factor * h for factor in branches]
    out = jax.jit(lambda params, x: block.apply({"params": params}, x, *functions))(params, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_keeps_one_wide_array_for_its_backward_pass(activation):
    mlp, x = Mlp(8, activation), jnp.ones((2, 3, 8))
    params = mlp.init(jax.random.key(0), x)
    _, backward = jax.vjp(lambda x: mlp.apply(params, x), x)  # a tree of its residuals
    assert sum(leaf.shape == (2, 3, 32) for leaf in jax.tree.leaves(backward)) == 1


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
    params = random_params(module, rows())
    exact = np.asarray(jax.jit(module.apply)({"params": params}, rows()))
    half = module.clone(dtype=jnp.bfloat16)
    rounded: Any = jax.jit(half.apply)({"params": params}, rows())
    assert rounded.dtype == jnp.bfloat16
    error = abs(np.asarray(rounded, np.float32) - exact).max() / abs(exact).max()
    assert 0 < error < 0.05
