"""Widths of captions: the smallest that holds all of them."""

import numpy as np
import pytest

from vop_jax.data import tokenizer


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
    assert tokenizer.longest(ids) == max(lengths)
    np.testing.assert_array_equal(tokenizer.cut(ids, given), ids[:, :width])


def test_no_captions_take_no_slots():
    assert tokenizer.longest(np.zeros((0, 20), np.int32)) == 0


@pytest.mark.parametrize(
    ("long", "batch_size", "found"),
    [
        (0, 4, (5,)),  # none is long
        (1, 4, (5, 20)),
        (1, 99, (5, 20)),  # once in a hundred times the long one is left out
        (1, 100, (20,)),  # the whole split
        (1, 300, (20,)),
        (5, 74, (20,)),  # 26 * 25 * 24 * 23 * 22 of 100 * 99 * 98 * 97 * 96 is less than RARE
        (5, 73, (5, 20)),
        (100, 4, (20,)),
    ],
)
def test_widths_that_batches_will_have(long, batch_size, found):
    ids = captions(*[4] * (100 - long), *[9] * long)
    assert tokenizer.widths(ids, (5,), batch_size) == found


def test_widths_are_those_that_are_met():
    rng = np.random.default_rng(0)
    ids = captions(*rng.integers(2, 21, 300))
    met = {tokenizer.cut(ids[rng.integers(300, size=3)], (8, 12, 30)).shape[1] for _ in range(2000)}
    assert tokenizer.widths(ids, (8, 12, 30), 3) == tuple(sorted(met)) == (8, 12, 20)


def test_without_buckets_there_is_one_width():
    assert tokenizer.widths(captions(3, 4), (), 2) == (20,)
