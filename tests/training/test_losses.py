import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.training.step import symmetric_cross_entropy

loss = jax.jit(symmetric_cross_entropy)


def unit_rows(seed, count, width=6):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def reference(text, video, temperature):
    """In double precision, one pair at a time."""
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
def test_equals_double_precision(seed, temperature):
    text, video = unit_rows(seed, 7), unit_rows(seed + 1, 7)
    expected = reference(text, video, temperature)
    np.testing.assert_allclose(loss(text, video, temperature), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_gradients_are_finite_even_of_a_collapsed_or_separated_batch(temperature):
    gradient = jax.jit(jax.grad(symmetric_cross_entropy, argnums=(0, 1, 2)))
    same, apart = np.repeat(unit_rows(0, 1), 5, axis=0), np.eye(5, 6, dtype=np.float32)
    for text, video in ((same, same), (apart, apart), (apart, -apart)):
        assert np.isfinite(loss(text, video, temperature))
        for leaf in gradient(text, video, temperature):
            assert np.isfinite(leaf).all()


def test_gradient_equals_finite_differences():
    text, video = unit_rows(0, 4), unit_rows(1, 4)
    gradient = jax.grad(symmetric_cross_entropy)(text, video, 5.0)
    step = 1e-5
    for i, j in ((0, 0), (2, 3), (3, 5)):
        up, down = text.astype(np.float64), text.astype(np.float64)
        up[i, j] += step
        down[i, j] -= step
        slope = (reference(up, video, 5.0) - reference(down, video, 5.0)) / (2 * step)
        np.testing.assert_allclose(gradient[i, j], slope, rtol=1e-3, atol=1e-5)


def test_chance_is_the_logarithm_of_the_batch():
    rows = np.repeat(unit_rows(0, 1), 8, axis=0)
    np.testing.assert_allclose(loss(rows, rows, 50.0), np.log(8), rtol=1e-6)


def test_a_perfect_batch_costs_nothing_and_a_swapped_one_much():
    rows = np.eye(4, dtype=np.float32)
    assert loss(rows, rows, 100.0) < 1e-6
    assert loss(rows, rows[::-1], 100.0) > 99


def test_sides_are_interchangeable():
    text, video = unit_rows(0, 5), unit_rows(1, 5)
    np.testing.assert_allclose(loss(text, video, 20.0), loss(video, text, 20.0), rtol=1e-6)


def test_one_pair_has_no_negatives():
    assert loss(unit_rows(0, 1), unit_rows(1, 1), 100.0) == 0
