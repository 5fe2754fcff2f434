"""jax's kernel for TPUs, interpreted on a CPU, against attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vop_jax.clip.kernels import splash_attention
from vop_jax.clip.kernels.attention import KeyValues, attention
from vop_jax.model import TextVideoModel
from vop_jax.tuning.methods import MethodConfig


@pytest.mark.parametrize(
    ("length", "side"), [(1, 128), (128, 128), (129, 256), (608, 640), (641, 384), (16456, 640)]
)
def test_tiles_are_few_and_little_is_filled_up(length, side):
    assert splash_attention.tile(length) == side


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (128, 128), (130, 700)])
def test_values_and_gradients_are_those_of_plain_attention(queries, keys):
    rng = np.random.default_rng(0)
    shapes = [(2, queries, 2, 16), (2, keys, 2, 16), (2, keys, 2, 16)]
    qkv = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    weight = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)

    def result(attend):
        value = lambda *x: (attend(*x) * weight).sum()  # noqa: E731
        return jax.value_and_grad(value, argnums=(0, 1, 2))(*qkv)

    ours = result(functools.partial(splash_attention.attention, interpret=True))
    theirs = result(lambda q, k, v: attention(q, KeyValues(k, v)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, theirs)


@pytest.mark.parametrize("name", ["vop_f", pytest.param("vop", marks=pytest.mark.slow)])
def test_across_frames_and_nowhere_else(monkeypatch, name):
    lengths = []
    interpreted = functools.partial(splash_attention.attention, interpret=True)

    def spy(query, key, value):
        lengths.append((query.shape[1], key.shape[1]))
        return interpreted(query, key, value)

    monkeypatch.setattr(splash_attention, "attention", spy)
    method = MethodConfig(name, visual_prompts=2, split_layer=1, frames=tiny.FRAMES)
    model = TextVideoModel(tiny.CLIP, method)
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    frames = tiny.frames(2)

    @functools.partial(jax.jit, static_argnums=0)
    def video(model):
        return model.apply({"params": params}, frames, method="encode_video")

    np.testing.assert_allclose(video(model.clone(kernel="splash")), video(model), atol=1e-5)
    # Of three layers the first is in frames, and few queries of the last are read.
    assert lengths == ([(tiny.FRAMES * 5, tiny.FRAMES * 5 + 2)] if name == "vop_f" else [])
