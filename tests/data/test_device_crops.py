"""Pillow's resizing restated in whole numbers, without rounding anything else."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.data.device_crops import BITS, Sides, sides_of, weights_of
from vop_jax.video.crops import centre_cut, cut_out, draw_cut

SIZE = 20


def one_pass(rows, first, weights):
    """int [h, ...] -> [size, ...] along the first axis."""
    padded = np.concatenate([rows, np.zeros((weights.shape[1], *rows.shape[1:]), int)])
    taps = padded[first[:, None] + np.arange(weights.shape[1])]  # [size, K, ...]
    total = np.einsum("sk,sk...->s...", weights.astype(int), taps)
    return np.clip((total + (1 << BITS - 1)) >> BITS, 0, 255)


@settings(deadline=None, max_examples=60)
@given(
    h=st.integers(1, 90), w=st.integers(1, 90), seed=st.integers(0, 10**6), centred=st.booleans()
)
def test_equal_to_pillow_in_every_pixel(h, w, seed, centred):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    cut = centre_cut((h, w), SIZE) if centred else draw_cut((h, w), SIZE, rng, flip=False)
    sides = Sides(sides_of(cut), SIZE)
    vertical, horizontal = sides.numbers(cut)
    box = frame[cut.top : cut.top + cut.height, cut.left : cut.left + cut.width].astype(int)
    x = one_pass(box.swapaxes(0, 1), sides.first[horizontal], sides.weights[horizontal])
    x = one_pass(x.swapaxes(0, 1), sides.first[vertical], sides.weights[vertical])
    np.testing.assert_array_equal(x, cut_out([frame], SIZE, cut)[0])


def test_a_side_that_keeps_its_length_is_itself():
    first, weights = weights_of(SIZE, SIZE)
    at, tap = np.nonzero(weights)
    np.testing.assert_array_equal(first[at] + tap, np.arange(SIZE))
    assert (weights[at, tap] == 1 << BITS).all()


def test_weights_add_up_to_one():
    for length, size in ((7, 20), (20, 7), (333, 224), (1, 5)):
        _, weights = weights_of(length, size)
        assert abs(weights.sum(axis=1) - (1 << BITS)).max() <= weights.shape[1]
