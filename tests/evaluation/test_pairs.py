"""Both directions out of one pass: the tiles themselves; the ranks are tested in test_metrics."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.embeddings import random_pairs
from vop_jax.evaluation import pairs as tiles
from vop_jax.evaluation import ranks

COUNTS = st.integers(1, 3000)


@given(COUNTS, COUNTS, st.integers(1, 10**7))
def test_a_tile_is_within_the_bound_and_no_higher_than_wide(texts, videos, elements):
    high, wide = tiles.tile_sizes(texts, videos, elements)
    assert 1 <= high <= texts and 1 <= wide <= videos and high * wide <= elements
    # The columns of a tile's texts are neighbours: one tile holds them all.
    assert high <= wide or wide == videos
    if texts * videos <= elements:
        assert (high, wide) == (texts, videos)


@pytest.mark.parametrize("elements", [1, 50, 997, 10**6])
@pytest.mark.parametrize(("texts", "videos"), [(1, 1), (40, 40), (103, 13), (30, 29)])
def test_each_direction_equals_its_own_pass(texts, videos, elements):
    """On similarities that are exact, many of them equal, several texts of a video or one."""
    rng = np.random.default_rng(texts)
    owner = np.concatenate([rng.permutation(videos), rng.integers(0, videos, texts - videos)])
    text_rows = rng.integers(-4, 5, (texts, 3)).astype(np.float32)
    video_rows = rng.integers(-4, 5, (videos, 3)).astype(np.float32)
    found = tiles.pair_ranks(text_rows, video_rows, owner, elements=elements)
    every = np.arange(videos)
    text, _, rank = ranks.own_ranks(text_rows, video_rows, owner, every)
    np.testing.assert_array_equal(found[0][text], rank)
    _, text, rank = ranks.own_ranks(video_rows, text_rows, every, owner)
    np.testing.assert_array_equal(found[1][text], rank)


def test_every_similarity_is_computed_once_and_own_ones_once_more(monkeypatch):
    made = []
    tile = tiles._tile

    def spied(*args):
        made.append(tile(*args))
        return made[-1]

    monkeypatch.setattr(tiles, "_tile", spied)
    before = tile._cache_size(), tiles._count._cache_size()
    texts, videos, owner = random_pairs(50, 50, width=3)
    tiles.pair_ranks(texts, videos, owner, elements=100)
    assert {x.shape for x in made} == {(10, 10)} and len(made) == 5 * 5 + 5
    tiles.pair_ranks(texts[:47], videos[:41], owner[:47] % 41, elements=100)
    # The last tiles are filled up: other sizes of data, but no others of tiles.
    assert {x.shape for x in made} == {(10, 10)} and len(made) == 30 + 5 * 5 + 5
    assert tile._cache_size() == before[0] + 1
    assert tiles._count._cache_size() <= before[1] + 2


@pytest.mark.parametrize(("backend", "held"), [("cpu", 2**22), ("gpu", 2**28), ("tpu", 2**28)])
def test_what_is_held_suits_the_device(monkeypatch, backend, held):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert ranks.bound(None) == held and ranks.bound(7) == 7


def test_equal_rows_of_other_tiles_are_equal_to_the_bit():
    """Rounded similarities: own ones are read from another tile than they are compared in."""
    row = random_pairs(1, 1, width=512)[0]
    same = np.repeat(row, 101, axis=0)
    for elements in (100, 900, 10**6):
        for found in tiles.pair_ranks(same, same, np.arange(101), elements=elements):
            assert set(found) == {51.0}
