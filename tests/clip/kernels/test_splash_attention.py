"""jax's kernel for TPUs, interpreted on a CPU, against attention in plain JAX."""

import functools

import jax
import numpy as np
import pytest

from tests import tiny
from tests.clip.kernels.kernels import assert_same, normal
from vop_jax.clip.kernels import splash_attention
from vop_jax.clip.kernels.attention import KeyValues, attention
from vop_jax.tuning.methods import MethodConfig

interpreted = functools.partial(splash_attention.attention, interpret=True)


@pytest.mark.parametrize(
    ("length", "side"), [(1, 128), (128, 128), (129, 256), (608, 640), (641, 384), (16456, 640)]
)
def test_tiles_are_few_with_little_padding(length, side):
    assert splash_attention.tile(length) == side


def test_values_and_gradients_equal_plain_attention():
    q = normal(2, 130, 2, 16)
    k, v = normal(2, 700, 2, 16, seed=1), normal(2, 700, 2, 16, seed=2)
    plain = lambda q, k, v: attention(q, KeyValues(k, v))  # noqa: E731
    assert_same(interpreted, plain, q, k, v, atol=2e-4)


def test_a_model_uses_it_across_frames_only(monkeypatch):
    lengths = []

    def spy(query, key, value):
        lengths.append((query.shape[1], key.shape[1]))
        return interpreted(query, key, value)

    monkeypatch.setattr(splash_attention, "attention", spy)
    method = MethodConfig("vop_f", visual_prompts=2, split_layer=1, frames=tiny.FRAMES)
    model, params = tiny.model_and_params(method)
    frames = tiny.frames(2)

    @functools.partial(jax.jit, static_argnums=0)
    def video(model):
        return model.apply({"params": params}, frames, method="encode_video")

    np.testing.assert_allclose(video(model.clone(kernel="splash")), video(model), atol=1e-5)
    # Of three layers the first is within frames, and the last has few queries.
    assert lengths == [(tiny.FRAMES * 5, tiny.FRAMES * 5 + 2)]
