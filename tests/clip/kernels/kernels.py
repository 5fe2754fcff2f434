"""Comparison of kernels, and those of NVIDIA's GPUs interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.clip import remat
from vop_jax.clip.kernels import fused_attention, layer_norm


def normal(*shape, seed=0, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), dtype)


def assert_same(ours, theirs, *arguments, atol=1e-4, rtol=0.0):
    """Two functions have the same values and gradients, those of a weighted sum of the values."""

    def result(function):
        def value(*arguments):
            out = function(*arguments)
            leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(out)]
            return sum(
                (x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in leaves
            ), out

        argnums = tuple(range(len(arguments)))
        return jax.jit(jax.grad(value, argnums=argnums, has_aux=True))(*arguments)

    def compare(a, b):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=atol * max(1, abs(b).max()), rtol=rtol)

    jax.tree.map(compare, result(ours), result(theirs))


def interpret(monkeypatch) -> tuple[list, list]:
    """Interprets the kernels; records shapes that attention packs, and kinds of norms' backward."""
    packed, backward = [], []
    attention = functools.partial(fused_attention.attention, interpret=True)
    normalized = layer_norm.normalized

    def attend(*arguments):
        packed.append(arguments[0].shape)
        return attention(*arguments)

    def normalize(*arguments):
        backward.append(arguments[-1])
        kind = {"plain": "plain", "kernel": "interpreted"}[arguments[-1]]
        return normalized(*arguments[:-1], kind)

    monkeypatch.setattr(fused_attention, "attention", attend)
    monkeypatch.setattr(layer_norm, "normalized", normalize)
    traced = functools.cache(remat._traced_once.__wrapped__)  # without traces of other tests
    monkeypatch.setattr(remat, "_traced_once", traced)
    return packed, backward
