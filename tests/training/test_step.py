"""The loss, the optimizer and the temperature, against double precision and by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from vop_jax.clip.model import unit
from vop_jax.clip.weights import parameter_shapes
from vop_jax.config.base import base_config
from vop_jax.storage.tensors import flatten, unflatten
from vop_jax.training.step import (
    TrainState,
    learning_rate,
    loss_and_gradient,
    make_optimizer,
    make_train_step,
    symmetric_cross_entropy,
    weight_decay_mask,
)

loss = jax.jit(symmetric_cross_entropy)


def unit_rows(seed, count, width=6):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def reference(text, video, temperature):
    """The loss in double precision, one pair at a time."""
    text, video = text.astype(np.float64), video.astype(np.float64)
    terms = []
    for a, b in ((text, video), (video, text)):
        for i in range(len(a)):
            logits = temperature * (b @ a[i])
            top = logits.max()
            terms.append(top + np.log(np.exp(logits - top).sum()) - logits[i])
    return np.mean(terms)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_the_loss_equals_double_precision(seed, temperature):
    text, video = unit_rows(seed, 7), unit_rows(seed + 1, 7)
    expected = reference(text, video, temperature)
    np.testing.assert_allclose(loss(text, video, temperature), expected, rtol=2e-5, atol=1e-6)


def test_the_loss_of_batches_known_by_hand():
    same, apart = np.repeat(unit_rows(0, 1), 8, axis=0), np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(loss(same, same, 50.0), np.log(8), rtol=1e-6)  # chance
    assert loss(apart, apart, 100.0) < 1e-6 and loss(apart, apart[::-1], 100.0) > 99
    assert loss(same[:1], same[:1], 100.0) == 0  # one pair has no negatives


@pytest.mark.parametrize("temperature", [0.0, 100.0])
def test_gradients_are_finite_even_of_a_collapsed_or_separated_batch(temperature):
    gradient = jax.jit(jax.grad(symmetric_cross_entropy, argnums=(0, 1, 2)))
    same, apart = np.repeat(unit_rows(0, 1), 5, axis=0), np.eye(5, 6, dtype=np.float32)
    for text, video in ((same, same), (apart, apart), (apart, -apart)):
        assert all(np.isfinite(leaf).all() for leaf in gradient(text, video, temperature))


def test_the_gradient_equals_finite_differences():
    text, video = unit_rows(0, 4), unit_rows(1, 4)
    gradient = jax.jit(jax.grad(symmetric_cross_entropy))(text, video, 5.0)
    step = 1e-5
    for i, j in ((0, 0), (2, 3), (3, 5)):
        up, down = text.astype(np.float64), text.astype(np.float64)
        up[i, j] += step
        down[i, j] -= step
        slope = (reference(up, video, 5.0) - reference(down, video, 5.0)) / (2 * step)
        np.testing.assert_allclose(gradient[i, j], slope, rtol=1e-3, atol=1e-5)


def train_config(**values):
    config = base_config().train
    config.update(values)
    return config


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(100, 0.1), (7, 0.0), (1000, 0.025), (0, 0.1), (1, 0.1), (1, 1.0), (5, 1.0)],
)
def test_linear_warm_up_then_cosine_to_zero(steps, warmup):
    """Short runs, which may end in the warm-up, have a finite rate."""
    schedule = learning_rate(train_config(steps=steps, warmup=warmup, learning_rate=0.3))
    first = round(warmup * steps)
    for step in np.unique(np.linspace(0, steps, 25).astype(int)):
        if step < first:
            expected = 0.3 * step / first
        else:
            expected = 0.3 * (1 + math.cos(math.pi * (step - first) / max(steps - first, 1))) / 2
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-4, atol=1e-7)


def test_norms_biases_and_temperature_do_not_decay():
    names = [*(f"clip/{name}" for name in parameter_shapes(tiny.CLIP)), "prompts/visual"]
    mask = flatten(weight_decay_mask(unflatten(dict.fromkeys(names, 0))))
    assert mask.keys() == set(names)
    spared = {name.rpartition("/")[2] for name, decays in mask.items() if not decays}
    assert spared == {"bias", "scale", "logit_scale"}
    decayed = {name.rpartition("/")[2] for name, decays in mask.items() if decays}
    assert {"kernel", "visual", "positional_embedding"} <= decayed and not decayed & spared


def test_adamw_after_clipping_and_with_decay_of_weights_alone_by_hand():
    values = {"learning_rate": 0.1, "weight_decay": 0.2, "clip_norm": 1.0}
    optimizer = make_optimizer(train_config(steps=10**6, warmup=0.0, **values))
    start, small = np.array([1.0, -2.0], np.float32), np.array([0.3, -0.4], np.float32)
    params = {"kernel": start, "a": {"bias": start}}
    state = optimizer.init(params)
    w, b, m, v = start.astype(np.float64), start.astype(np.float64), 0.0, 0.0
    # The norm is that of all parameters together: sqrt(2) / 2 of the small gradient.
    for t, (factor, clipped) in enumerate([(1, 1), (100, 2**0.5), (9, 2**0.5)], 1):
        gradient = {"kernel": factor * small, "a": {"bias": factor * small}}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        g = clipped * small.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w, b = w - 0.1 * (adam + 0.2 * w), b - 0.1 * adam
    np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"], m, rtol=1e-4)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-4)
    np.testing.assert_allclose(params["a"]["bias"], b, rtol=1e-4)


class Rows:
    """In place of the model: embeddings are the batch, the temperature is CLIP's."""

    def apply(self, variables, *rows, method):
        if method == "temperature":
            return jnp.exp(variables["params"]["clip"]["logit_scale"])
        return unit(rows[0])


PAIRED = np.eye(4, dtype=np.float32)
SHUFFLED = PAIRED[[1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("videos", "moves"),
    [(SHUFFLED, "down"), (1.05 * PAIRED + SHUFFLED, "up")],
    ids=["wrong pairs", "right pairs"],
)
@pytest.mark.parametrize("start", [4.6052, math.log(100), 0.0])
def test_the_temperature_learns_between_1_and_100(start, videos, moves):
    """Also from where OpenAI's CLIPs are: at the bound, or above it by rounding."""
    batch = {"ids": PAIRED, "frames": videos}
    trainable = {"clip": {"logit_scale": jnp.float32(start)}}
    gradient = loss_and_gradient(Rows(), trainable, {}, batch)[1]["clip"]["logit_scale"]
    assert gradient > 0 if moves == "down" else gradient < 0
    optimizer = optax.sgd(1e4)
    state = TrainState.create(trainable, optimizer)
    state, _ = jax.jit(make_train_step(Rows(), optimizer))(state, {}, batch)
    scale = state.trainable["clip"]["logit_scale"]
    assert scale.dtype == jnp.float32
    assert scale == np.float32(0.0 if moves == "down" else math.log(100))


def test_the_temperature_of_a_frozen_clip_stays_as_it_is():
    frozen = {"clip": {"logit_scale": jnp.float32(math.log(120))}}
    batch = {"ids": PAIRED, "frames": SHUFFLED}
    loss, gradient = loss_and_gradient(Rows(), {"prompts": {"text": jnp.ones(3)}}, frozen, batch)
    assert loss == pytest.approx(120, rel=1e-5)  # OpenAI's forward pass has no bound
    assert gradient.keys() == {"prompts"}
