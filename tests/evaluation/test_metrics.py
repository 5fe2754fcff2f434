"""Ranks of both directions, against their definition one pair at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.embeddings import pairs, random_pairs
from vop_jax.evaluation import metrics


def brute_force(texts, videos, owner):
    """(t2v, v2t, v2t per caption, v2t grouped), in plain Python."""

    def similar(text, video):
        return sum(float(a) * float(b) for a, b in zip(texts[text], videos[video], strict=True))

    def rank(own, others):
        return 1 + sum(s > own for s in others) + sum(s == own for s in others) / 2

    t2v, per_caption = [], []
    for i, j in enumerate(owner):
        own = similar(i, j)
        t2v.append(rank(own, [similar(i, k) for k in range(len(videos)) if k != j]))
        others = [similar(k, j) for k in range(len(texts)) if owner[k] != j]
        per_caption.append(rank(own, others))
    v2t = [min(per_caption[i] for i in range(len(texts)) if owner[i] == j) for j in set(owner)]
    groups = [[i for i in range(len(texts)) if owner[i] == j] for j in range(len(videos))]
    grouped = []
    for j in range(len(videos)):
        near = [max(similar(i, j) for i in group) for group in groups]
        grouped.append(rank(near[j], [near[k] for k in range(len(videos)) if k != j]))
    return t2v, v2t, per_caption, grouped


@settings(max_examples=40, deadline=None)
@given(pairs())
def test_ranks_equal_the_definition_with_ties_and_several_captions(drawn):
    texts, videos, owner, elements = drawn
    ranks = metrics.rank_pairs(texts, videos, owner, elements=elements)
    t2v, v2t, per_caption, grouped = brute_force(texts, videos, owner)
    np.testing.assert_array_equal(ranks.t2v, t2v)
    np.testing.assert_array_equal(ranks.v2t, v2t)
    np.testing.assert_array_equal(ranks.v2t_per_caption, per_caption)
    np.testing.assert_array_equal(ranks.v2t_grouped, grouped)


@settings(max_examples=15, deadline=None)
@given(pairs(), st.integers(0, 100))
def test_the_order_of_queries_does_not_matter(drawn, seed):
    texts, videos, owner, elements = drawn
    straight = metrics.rank_pairs(texts, videos, owner, elements=elements)
    rng = np.random.default_rng(seed)
    of_texts, of_videos = rng.permutation(len(texts)), rng.permutation(len(videos))
    moved = np.argsort(of_videos)[owner[of_texts]]
    shuffled = metrics.rank_pairs(texts[of_texts], videos[of_videos], moved, elements=elements)
    np.testing.assert_array_equal(shuffled.t2v, straight.t2v[of_texts])
    np.testing.assert_array_equal(shuffled.v2t, straight.v2t[of_videos])
    np.testing.assert_array_equal(shuffled.v2t_per_caption, straight.v2t_per_caption[of_texts])
    np.testing.assert_array_equal(shuffled.v2t_grouped, straight.v2t_grouped[of_videos])


def clip4clip(texts, videos, owner):
    """Video to text as its `eval_epoch` and `compute_metrics` have it, where nothing is tied."""
    similar = texts[np.argsort(owner, kind="stable")] @ videos.T
    ends = np.cumsum(np.bincount(owner))
    longest = np.bincount(owner).max()
    tensor = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        filler = np.full((longest - end + start, len(videos)), -np.inf)
        tensor.append(np.concatenate([similar[start:end], filler]))
    x = np.stack(tensor).max(axis=1).T
    place = np.where(np.sort(-x, axis=1) - np.diag(-x)[:, None] == 0)[1]
    recalls = {f"R@{k}": 100 * np.mean(place < k) for k in (1, 5, 10)}
    return recalls | {"MnR": place.mean() + 1, "MdR": np.median(place) + 1}


def test_groups_of_captions_are_those_of_clip4clip():
    texts, videos, owner = random_pairs(150, 40, similar=0.3)
    ranks = metrics.rank_pairs(texts, videos, owner, elements=1000)
    found = metrics.summarize(ranks.v2t_grouped)
    assert found == pytest.approx(clip4clip(texts, videos, owner))
    any_caption = metrics.summarize(ranks.v2t)
    assert found["R@1"] == any_caption["R@1"] and found["R@10"] > any_caption["R@10"]


def test_one_caption_per_video_is_one_protocol():
    texts, videos, owner = random_pairs(12, 12)
    ranks = metrics.rank_pairs(texts, videos, owner)
    np.testing.assert_array_equal(ranks.v2t[owner], ranks.v2t_per_caption)


def test_any_caption_is_the_best_of_the_captions_of_a_video():
    videos = np.eye(2, dtype=np.float32)
    texts = np.array([[1, 0], [0.25, 0], [0, 1], [0.5, 0.5]], np.float32)
    ranks = metrics.rank_pairs(texts, videos, np.array([0, 0, 1, 1]))
    # Video 0: 1 and 0.25 among 0 and 0.5; video 1: 1 and 0.5 among 0 and 0.
    assert list(ranks.v2t_per_caption) == [1, 2, 1, 1]
    assert list(ranks.v2t) == [1, 1]


@pytest.mark.parametrize("rows", [5, 9, 37])
def test_equal_embeddings_rank_at_chance(rows):
    """Also where similarities are rounded: equal rows must have equal ones, wherever they are."""
    same = np.repeat(random_pairs(1, 1, width=61)[0], rows, axis=0)
    ranks = metrics.rank_pairs(same, same, np.arange(rows), elements=4 * rows)
    assert set(ranks.t2v) == set(ranks.v2t) == {(rows + 1) / 2}  # the mean rank, not 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 3, 5])
@pytest.mark.parametrize("side", ["texts", "videos"])
def test_non_finite_similarities_are_an_error(bad, row, side):
    texts, videos, owner = random_pairs(6, 6)
    {"texts": texts, "videos": videos}[side][row, 1] = bad
    for elements in (6, 24):
        with pytest.raises(FloatingPointError, match="not finite"):
            metrics.rank_pairs(texts, videos, owner, elements=elements)
        with pytest.raises(FloatingPointError, match="not finite"):
            metrics.top_videos(texts, videos, 2, elements=elements)


@pytest.mark.parametrize("owner", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_a_video_without_a_caption_is_refused(owner):
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="every video"):
        metrics.rank_pairs(rows, rows, np.array(owner))


def test_missing_videos_count_as_misses():
    rows = np.eye(3, dtype=np.float32)
    ranks = metrics.with_misses(metrics.rank_pairs(rows, rows, np.arange(3)), texts=2, videos=1)
    assert list(ranks.t2v) == [1, 1, 1, 4, 4]
    assert list(ranks.v2t) == [1, 1, 1, 5]
    assert list(ranks.v2t_per_caption) == [1, 1, 1, 5, 5]
    assert list(ranks.v2t_grouped) == [1, 1, 1, 4]


def test_half_ranks_of_ties_are_outside_the_recall_below_them():
    summary = metrics.summarize(np.array([1.0, 1.5, 5.0, 5.5, 11.0]))
    assert summary == {"R@1": 20.0, "R@5": 60.0, "R@10": 80.0, "MnR": 4.8, "MdR": 5.0}


def test_contrast_accuracy_counts_captions_closer_than_their_contrast():
    videos = np.eye(2, dtype=np.float32)
    texts = videos[[0, 0, 1, 1]]
    contrasts = np.array([[0, 1], [1, 0], [0.6, 0.8], [0, -1]], np.float32)
    owner = np.array([0, 0, 1, 1])
    # Closer, equal, closer, closer; in the other order: farther, equal, farther, farther.
    assert metrics.contrast_accuracy(texts, contrasts, videos, owner) == 87.5
    assert metrics.contrast_accuracy(contrasts, texts, videos, owner) == 12.5
    with pytest.raises(FloatingPointError, match="not finite"):
        metrics.contrast_accuracy(texts, contrasts * np.nan, videos, owner)


@pytest.mark.parametrize("elements", [1, 10, 1000])
def test_top_videos_are_the_nearest_best_first(elements):
    rng = np.random.default_rng(0)
    texts = rng.integers(-2, 3, (7, 3)).astype(np.float32)
    videos = rng.integers(-2, 3, (5, 3)).astype(np.float32)
    rows, similarities = metrics.top_videos(texts, videos, 3, elements=elements)
    for text, row, similar in zip(texts, rows, similarities, strict=True):
        expected = sorted(range(5), key=lambda j: (-(text @ videos[j]), j))[:3]
        assert list(row) == expected
        assert list(similar) == [text @ videos[j] for j in expected]
    assert metrics.top_videos(texts, videos, 9)[0].shape == (7, 5)
