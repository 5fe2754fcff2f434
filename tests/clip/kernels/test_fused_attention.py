"""The kernel for short sequences, interpreted on a CPU, against attention in plain JAX.

On a GPU itself it was compared by hand, in bfloat16; see docs/benchmarks/speed.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.clip.kernels import kernels
from vop_jax.clip.kernels import fused_attention
from vop_jax.clip.kernels.attention import KeyValues, attention
from vop_jax.tuning.methods import MethodConfig

N, T, H, K, P = 4, 10, 2, 16, 3


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(0, 1, shape), jnp.float32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [None, 1, 2, 4])  # by how many, no tokens beside
def test_values_and_gradients_are_those_of_plain_attention(masked, shared):
    packed, bias, weight = drawn(N, T, 3, H, K), drawn(3, H, K), drawn(N, T, H, K)
    beside = () if shared is None else (drawn(shared, P, H, K), 2 * drawn(shared, P, H, K))
    seen = np.random.default_rng(0).random((N, 1, T, P)) < 0.5
    masks = jnp.tril(jnp.ones((1, 1, T, T), bool)), jnp.asarray(seen)
    own_mask, other_mask = masks if masked else (None, None)

    def plainly(packed, bias, beside):
        query, *own = (packed[:, :, i] + bias[None, None, i] for i in range(3))
        others = [KeyValues(*beside, other_mask)] if beside else []
        return attention(query, KeyValues(*own, own_mask), *others)

    def by_kernel(packed, bias, beside):
        others = KeyValues(*beside, other_mask) if beside else None
        return fused_attention.attention(packed, bias, own_mask, others, interpret=True)

    def result(attend):
        value = lambda *x: (attend(*x) * weight).sum()  # noqa: E731
        return jax.value_and_grad(value, argnums=(0, 1, 2))(packed, bias, beside)

    ours, theirs = result(by_kernel), result(plainly)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


@pytest.mark.parametrize(
    ("lengths", "width", "fits"),
    [((50, 8), 64, True), ((128,), 64, True), ((129,), 64, False), ((50, 8), 48, False)],
)
def test_it_takes_short_sequences_and_heads_of_a_power_of_two(lengths, width, fits):
    assert fused_attention.supports(lengths, width) is fits


QUICK = ("vop_f+p",)
OTHERS = ("vop", "vop_p", "vop_c", "zero_shot", "adapter_attn")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_a_model_with_it_is_the_same_model(monkeypatch, name):
    """In all layers but the last of each tower; so few tokens are short across frames, too."""
    clip = dataclasses.replace(tiny.CLIP, text_heads=1)  # heads of 16, as the kernel takes them
    calls, norms = kernels.interpret(monkeypatch)
    method = MethodConfig(name, visual_prompts=2, specific_prompts=1, frames=tiny.FRAMES)
    model, params = tiny.model_and_params(method, clip=clip)
    fused = model.clone(kernel="fused")
    frames, ids = tiny.frames(2), tiny.captions(2, method.text_slots(clip))

    def gradient(model):
        def value(params):
            video, text = model.apply({"params": params}, frames, ids)
            return (video * text).sum(), (video, text)

        return jax.jit(jax.grad(value, has_aux=True))(params)

    for ours, theirs in zip(*map(jax.tree.leaves, map(gradient, (fused, model))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert len(calls) == clip.vision_layers + clip.text_layers - 2
    assert norms.count("kernel") == 2 * (clip.vision_layers + clip.text_layers)
