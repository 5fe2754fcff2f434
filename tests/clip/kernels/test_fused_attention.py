"""The kernel for short sequences, interpreted on a CPU, against attention in plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.clip.kernels import kernels
from tests.clip.kernels.kernels import normal
from vop_jax.clip.kernels import fused_attention
from vop_jax.clip.kernels.attention import KeyValues, attention
from vop_jax.clip.layers import Block, PromptTokens
from vop_jax.tuning.methods import MethodConfig

N, T, H, K, P = 4, 10, 2, 16, 3


@pytest.mark.parametrize(("masked", "shared"), [(False, None), (True, None), (False, 1), (True, 2)])
def test_values_and_gradients_equal_plain_attention(masked, shared):
    """With `shared` sets of extra keys, or without."""
    packed, bias = normal(N, T, 3, H, K), normal(3, H, K, seed=1)
    extra = () if shared is None else tuple(normal(shared, P, H, K, seed=i) for i in (2, 3))
    masks = jnp.tril(jnp.ones((1, 1, T, T), bool)), normal(N, 1, T, P) < 0
    own_mask, extra_mask = masks if masked else (None, None)

    def plain(packed, bias, extra):
        query, *own = (packed[:, :, i] + bias[None, None, i] for i in range(3))
        others = [KeyValues(*extra, extra_mask)] if extra else []
        return attention(query, KeyValues(*own, own_mask), *others)

    def kernel(packed, bias, extra):
        others = KeyValues(*extra, extra_mask) if extra else None
        return fused_attention.attention(packed, bias, own_mask, others, interpret=True)

    kernels.assert_same(kernel, plain, packed, bias, extra)


@pytest.mark.parametrize(
    ("lengths", "width", "supported"),
    [((50, 8), 64, True), ((128,), 64, True), ((129,), 64, False), ((50, 8), 48, False)],
)
def test_short_sequences_and_heads_of_a_power_of_two_are_supported(lengths, width, supported):
    assert fused_attention.supports(lengths, width) is supported


def test_a_block_with_the_kernels_has_the_same_gradients(monkeypatch):
    """Of its parameters, its input, and prompts that sequences share."""
    kernels.interpret(monkeypatch)
    x, prompts, block = normal(4, 9, 32), normal(2, 3, 32, seed=1), Block(32, 2, "gelu")
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, scale=0.4), shapes)

    def run(kernel, params, x, prompts):
        return block.apply(params, x, prompts=PromptTokens(prompts), kernel=kernel)

    fused, plain = (functools.partial(run, kernel) for kernel in ("fused", "xla"))
    kernels.assert_same(fused, plain, params, x, prompts)


METHODS = ("vop", "vop_p", "vop_c", "vop_f+p", "zero_shot", "adapter_attn")


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("vop_f+p", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in METHODS),
    ],
)
def test_a_model_with_the_kernels_is_the_same_model(monkeypatch, name, gradients):
    """In all layers but the last of each tower; so few tokens are short across frames, too."""
    clip = dataclasses.replace(tiny.CLIP, text_heads=1)  # heads of 16 fit the kernel
    attentions, norms = kernels.interpret(monkeypatch)
    method = MethodConfig(name, visual_prompts=2, specific_prompts=1, frames=tiny.FRAMES)
    model, params = tiny.model_and_params(method, clip=clip)
    frames, ids = tiny.frames(2), tiny.captions(2, method.text_slots(clip))

    def outputs(model):
        def value(params):
            video, text = model.apply({"params": params}, frames, ids)
            return (video * text).sum(), (video, text)

        program = jax.grad(value, has_aux=True) if gradients else value
        return jax.tree.leaves(jax.jit(program)(params))

    for ours, theirs in zip(outputs(model.clone(kernel="fused")), outputs(model), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # Blocks of one kind are traced once: those of the vision tower but the last.
    traced = clip.text_layers + (clip.vision_layers if method.parts.adapter else 2)
    assert len(attentions) == traced - 2
    assert norms.count("kernel") == 2 * traced
