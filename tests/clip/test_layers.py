"""The block against the same maths in NumPy, double precision."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.layers import ACTIVATIONS, Attention, Block, Mlp
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD, normalize_pixels

WIDTH, HEADS, TOKENS = 12, 3, 5
ERF = np.vectorize(math.erf)
REFERENCE = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
}


def rows(seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, (2, TOKENS, WIDTH)).astype(np.float32)


def random_params(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)


def exact(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


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


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(
        ACTIVATIONS[name](jnp.asarray(x)), REFERENCE[name](x.astype(float)), atol=1e-6
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_equals_its_formula(activation, causal):
    x = rows()
    block = Block(WIDTH, HEADS, activation, causal)
    params = random_params(block, x)
    p, expected = exact(params), x.astype(np.float64)
    expected = expected + attention(norm(expected, p["ln_1"]), p["attn"], causal)
    expected = expected + mlp(norm(expected, p["ln_2"]), p["mlp"], activation)
    got = jax.jit(block.apply)({"params": params}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_keeps_one_wide_array_for_its_backward_pass(activation):
    mlp, x = Mlp(8, activation), jnp.ones((2, 3, 8))
    params = mlp.init(jax.random.key(0), x)
    _, backward = jax.vjp(lambda x: mlp.apply(params, x), x)  # a tree of what it keeps
    assert sum(leaf.shape == (2, 3, 32) for leaf in jax.tree.leaves(backward)) == 1


def test_branches_read_the_normalised_input_and_are_added_beside():
    x = rows()
    block: Any = Block(WIDTH, HEADS, "gelu")
    params = random_params(block, x)
    p, expected = exact(params), x.astype(np.float64)
    h = norm(expected, p["ln_1"])
    expected = expected + attention(h, p["attn"], causal=False) + 3 * h
    h = norm(expected, p["ln_2"])
    expected = expected + mlp(h, p["mlp"], "gelu") - 2 * h
    got = block.apply({"params": params}, x, lambda h: 3 * h, lambda h: -2 * h)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_branch_of_zeros_changes_nothing():
    x = rows()
    block = Block(WIDTH, HEADS, "gelu")
    params = random_params(block, x)
    plain = block.apply({"params": params}, x)
    np.testing.assert_array_equal(
        plain, block.apply({"params": params}, x, jnp.zeros_like, jnp.zeros_like)
    )


def test_causal_attention_sees_no_later_token():
    attend: Any = Attention(WIDTH, HEADS, causal=True)
    x = rows()
    params = random_params(attend, x)
    later = x.copy()
    later[:, 3:] += 1
    before = np.asarray(attend.apply({"params": params}, x))
    after = np.asarray(attend.apply({"params": params}, later))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (abs(before - after)[:, 3:].max(axis=-1) > 1e-3).all()


def test_parameter_names_and_shapes_are_scenics():
    shapes = jax.eval_shape(Block(WIDTH, HEADS, "gelu").init, jax.random.key(0), rows())["params"]
    assert set(shapes) == {"ln_1", "attn", "ln_2", "mlp"}
    head = WIDTH // HEADS
    for name in ("query", "key", "value"):
        assert shapes["attn"][name]["kernel"].shape == (WIDTH, HEADS, head)
        assert shapes["attn"][name]["bias"].shape == (HEADS, head)
    assert shapes["attn"]["out"]["kernel"].shape == (HEADS, head, WIDTH)
    assert shapes["mlp"]["c_fc"]["kernel"].shape == (WIDTH, 4 * WIDTH)


@pytest.mark.parametrize("module", [Attention(WIDTH, HEADS), Mlp(WIDTH, "gelu")])
def test_modules_compute_in_their_dtype_over_float32_parameters(module):
    half = module.clone(dtype=jnp.bfloat16)
    params = random_params(module, rows())
    exact_rows = np.asarray(module.apply({"params": params}, rows()))
    rounded: Any = half.apply({"params": params}, rows())
    assert rounded.dtype == jnp.bfloat16
    error = abs(np.asarray(rounded, np.float32) - exact_rows).max() / abs(exact_rows).max()
    assert 0 < error < 0.05


def test_pixels_are_normalised_per_channel():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    expected = (frames / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    np.testing.assert_allclose(normalize_pixels(jnp.asarray(frames)), expected, atol=2e-6)


def test_pixels_that_are_not_bytes_are_refused():
    with pytest.raises(TypeError, match="frames are uint8 RGB, not float32"):
        normalize_pixels(jnp.zeros((1, 4, 4, 3)))
