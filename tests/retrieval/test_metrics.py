import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.retrieval import metrics


def brute_force(texts, videos, owner):
    """The definition, one pair at a time."""
    t2v = []
    for i, text in enumerate(texts):
        own = text @ videos[owner[i]]
        scores = [text @ v for j, v in enumerate(videos) if j != owner[i]]
        t2v.append(1 + sum(s > own for s in scores) + sum(s == own for s in scores) / 2)
    v2t = []
    for j, video in enumerate(videos):
        own = max(t @ video for i, t in enumerate(texts) if owner[i] == j)
        scores = [t @ video for i, t in enumerate(texts) if owner[i] != j]
        v2t.append(1 + sum(s > own for s in scores) + sum(s == own for s in scores) / 2)
    return t2v, v2t


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_equal_the_definition_with_ties_and_several_captions(data):
    videos = data.draw(st.integers(1, 7))
    extra = data.draw(st.lists(st.integers(0, videos - 1), max_size=8))
    owner = np.array(data.draw(st.permutations(list(range(videos)) + extra)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    # Small integers make ties frequent and products exact.
    text_rows = rng.integers(-1, 2, (len(owner), 3)).astype(np.float32)
    video_rows = rng.integers(-1, 2, (videos, 3)).astype(np.float32)
    block = data.draw(st.integers(1, 10))
    ranks = metrics.rank_pairs(text_rows, video_rows, owner, block=block)
    t2v, v2t = brute_force(text_rows, video_rows, owner)
    np.testing.assert_array_equal(ranks.t2v, t2v)
    np.testing.assert_array_equal(ranks.v2t, v2t)


def test_constant_embeddings_rank_at_chance():
    rows = np.ones((9, 4), np.float32)
    ranks = metrics.rank_pairs(rows, rows, np.arange(9))
    assert set(ranks.t2v) == {5.0}  # the mean of ranks 1 to 9, not 1


def test_non_finite_similarities_are_an_error():
    rows = np.eye(3, dtype=np.float32)
    bad = rows.copy()
    bad[1, 1] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        metrics.rank_pairs(rows, bad, np.arange(3))


def test_a_video_without_a_caption_is_refused():
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="every video"):
        metrics.rank_pairs(rows, rows, np.array([0, 0, 1]))


def test_missing_videos_count_as_misses():
    rows = np.eye(3, dtype=np.float32)
    ranks = metrics.with_misses(metrics.rank_pairs(rows, rows, np.arange(3)), texts=2, videos=1)
    assert list(ranks.t2v) == [1, 1, 1, 4, 4]
    assert list(ranks.v2t) == [1, 1, 1, 5]


def test_summary():
    summary = metrics.summarize(np.array([1.0, 1.5, 5.0, 11.0]))
    assert summary == {"R@1": 25.0, "R@5": 75.0, "R@10": 75.0, "MnR": 4.625, "MdR": 3.25}


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


def test_top_videos_are_the_nearest_best_first():
    rng = np.random.default_rng(0)
    texts = rng.integers(-2, 3, (7, 3)).astype(np.float32)
    videos = rng.integers(-2, 3, (5, 3)).astype(np.float32)
    rows, similarities = metrics.top_videos(texts, videos, 3, block=2)
    for text, row, similar in zip(texts, rows, similarities, strict=True):
        expected = sorted(range(5), key=lambda j: (-(text @ videos[j]), j))[:3]
        assert list(row) == expected
        assert list(similar) == [text @ videos[j] for j in expected]
    assert metrics.top_videos(texts, videos, 9)[0].shape == (7, 5)
