"""Widths of captions: the smallest that holds all of them."""

import numpy as np
import pytest

from vop_jax import buckets


def captions(*lengths, slots=20):
    """int32 [N, T] of these numbers of slots, EOT included; noise behind the EOT."""
    ids = np.ones((len(lengths), slots), np.int32)
    ids[np.arange(len(lengths)), np.array(lengths) - 1] = 9
    return ids


@pytest.mark.parametrize(
    ("lengths", "given", "width"),
    [
        ((2, 5), (5, 8), 5),
        ((2, 6), (5, 8), 8),
        ((6, 2), (8, 5), 8),
        ((9,), (5, 8), 20),
        ((9,), (5, 32), 20),
        ((2,), (), 20),
    ],
)
def test_the_smallest_bucket_that_holds_all(lengths, given, width):
    ids = captions(*lengths)
    assert buckets.longest(ids) == max(lengths)
    np.testing.assert_array_equal(buckets.cut(ids, given), ids[:, :width])


def test_no_captions_take_no_slots():
    assert buckets.longest(np.zeros((0, 20), np.int32)) == 0
