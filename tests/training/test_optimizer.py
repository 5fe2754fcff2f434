import math

import jax
import numpy as np
import optax
import pytest

from tests import tiny
from vop_jax.clip.weights import parameter_shapes
from vop_jax.config.base import base_config
from vop_jax.storage.tensors import flatten, unflatten
from vop_jax.training.step import learning_rate, make_optimizer, weight_decay_mask


def train_config(**values):
    config = base_config().train
    config.update(values)
    return config


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (50, 0.5), (7, 0.0), (1000, 0.025)])
def test_linear_warm_up_then_cosine_to_zero(steps, warmup):
    schedule = learning_rate(train_config(steps=steps, warmup=warmup, learning_rate=0.3))
    first = round(warmup * steps)
    for step in range(steps + 1):
        if step < first:
            expected = 0.3 * step / first
        else:
            expected = 0.3 * (1 + math.cos(math.pi * (step - first) / (steps - first))) / 2
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0.1), (1, 0.1), (1, 1.0), (5, 1.0)])
def test_short_runs_have_a_finite_rate(steps, warmup):
    schedule = learning_rate(train_config(steps=steps, warmup=warmup))
    assert all(np.isfinite(schedule(step)) for step in range(steps + 1))


def test_norms_biases_and_temperature_do_not_decay():
    names = [*(f"clip/{name}" for name in parameter_shapes(tiny.CLIP)), "prompts/visual"]
    mask = flatten(weight_decay_mask(unflatten(dict.fromkeys(names, 0))))
    assert mask.keys() == set(names)
    spared = {name for name, decays in mask.items() if not decays}
    assert {name.rpartition("/")[2] for name in spared} == {"bias", "scale", "logit_scale"}
    assert mask["prompts/visual"] and mask["clip/visual/proj/kernel"]
    assert mask["clip/text/positional_embedding"]
    assert not mask["clip/visual/ln_pre/scale"] and not mask["clip/logit_scale"]


def f32(*values):
    return np.array(values, np.float32)


def updates_of(params, gradient, count=1, **values):
    """What the first `count` steps change, with a constant rate of 0.1."""
    config = train_config(steps=10**6, warmup=0.0, learning_rate=0.1, **values)
    optimizer = make_optimizer(config)
    state, start = optimizer.init(params), params
    for _ in range(count):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: np.asarray(new - old), params, start)


def test_decay_shrinks_weights_alone():
    params = {"a": {"kernel": f32(2, 2, 2), "bias": f32(2, 2, 2)}}
    still = jax.tree.map(np.zeros_like, params)
    change = updates_of(params, still, weight_decay=0.2)["a"]
    np.testing.assert_allclose(change["kernel"], -0.1 * 0.2 * 2.0, rtol=1e-5)
    np.testing.assert_array_equal(change["bias"], 0)


def test_adamw_by_hand():
    params, gradient = {"w": f32(1, -2)}, {"w": f32(0.3, -0.4)}
    w, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for t in range(1, 4):
        g = gradient["w"]  # of norm 0.5: not clipped
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w -= 0.1 * (adam + 0.2 * w)
    change = updates_of(params, gradient, count=3, weight_decay=0.2)
    np.testing.assert_allclose(params["w"] + change["w"], w, rtol=1e-4)


def test_the_gradient_is_clipped_over_all_parameters_together():
    params = {"a": f32(0, 0), "b": f32(0, 0)}
    gradient = {"a": f32(30, 0), "b": f32(0, 40)}
    optimizer = make_optimizer(train_config(clip_norm=1.0))
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment["a"], [0.1 * 0.6, 0], rtol=1e-5)
    np.testing.assert_allclose(first_moment["b"], [0, 0.1 * 0.8], rtol=1e-5)


def test_moments_exist_for_what_is_trained_only():
    optimizer = make_optimizer(train_config())
    state = optimizer.init({"prompts": {"visual": np.zeros((2, 3), np.float32)}})
    assert sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == [6, 6]
