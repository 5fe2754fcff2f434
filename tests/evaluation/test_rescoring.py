"""Dual softmax and QB-Norm, against both written out over the whole matrix in float64."""

import numpy as np
import pytest
from hypothesis import given, settings

from tests.evaluation.embeddings import pairs, random_pairs, unit
from vop_jax.evaluation import metrics, rescoring


def dense_dual_softmax(similar, scale):
    """[Q, C] -> [Q, C]."""
    share = np.exp(scale * similar)
    return similar * share / share.sum(axis=0, keepdims=True)


def dense_query_bank(similar, of_bank, beta=20.0):
    """[Q, C], [B, C] -> [Q, C], as in the authors' dynamic_inverted_softmax."""
    activated = np.isin(similar.argmax(axis=1), of_bank.argmax(axis=1))
    normalised = np.exp(beta * similar) / np.exp(beta * of_bank).sum(axis=0, keepdims=True)
    return np.where(activated[:, None], normalised, similar)


def bounds(scores, group_of_query, group_of_candidate):
    """The least and the greatest rank of each pair, [Q, C], if scores are known to a part in 1e5.

    NaN where the candidate is not the query's own.
    """
    low, high = np.full(scores.shape, np.nan), np.full(scores.shape, np.nan)
    for q, row in enumerate(scores):
        others = row[group_of_candidate != group_of_query[q]]
        for c in np.flatnonzero(group_of_candidate == group_of_query[q]):
            slack = 1e-5 * np.maximum(np.abs(others), abs(row[c])) + 1e-30
            low[q, c] = 1 + (others > row[c] + slack).sum()
            high[q, c] = 1 + (others >= row[c] - slack).sum()
    return low, high


def dense_pairs(texts, videos, owner, t2v, v2t):
    """Bounds on (t2v, v2t per caption) of scores [N, M] and [M, N]."""
    every = np.arange(len(videos))
    of_text = [np.nanmax(b, axis=1) for b in bounds(t2v, owner, every)]
    of_video = [np.nanmax(b, axis=0) for b in bounds(v2t, every, owner)]
    return of_text, of_video


def assert_ranks(ranks, texts, videos, owner, t2v, v2t):
    for found, (low, high) in zip(
        (ranks.t2v, ranks.v2t_per_caption),
        dense_pairs(texts, videos, owner, t2v, v2t),
        strict=True,
    ):
        assert (low <= found).all() and (found <= high).all()


def similarities(texts, videos):
    return texts.astype(np.float64) @ videos.astype(np.float64).T


SIZES = [(1, 1), (23, 9)]
ELEMENTS = [1, 100]


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize(("count", "videos"), SIZES)
def test_dual_softmax_equals_the_dense_one(count, videos, elements):
    text_rows, video_rows, owner = random_pairs(count, videos, seed=count)
    similar = similarities(text_rows, video_rows)
    for scale in (1.0, 20.0):
        t2v = dense_dual_softmax(similar, scale)
        v2t = dense_dual_softmax(similar.T, scale)
        scores = (
            rescoring.dual_softmax(text_rows, video_rows, scale, elements=elements),
            rescoring.dual_softmax(video_rows, text_rows, scale, elements=elements),
        )
        found = metrics.rank_pairs(text_rows, video_rows, owner, scores=scores, elements=elements)
        assert_ranks(found, text_rows, video_rows, owner, t2v, v2t)


@settings(max_examples=15, deadline=None)
@given(pairs())
def test_dual_softmax_of_ties_zeros_and_negative_similarities(drawn):
    texts, videos, owner, elements = drawn
    similar = similarities(texts, videos)
    scores = (
        rescoring.dual_softmax(texts, videos, 4.0, elements=elements),
        rescoring.dual_softmax(videos, texts, 4.0, elements=elements),
    )
    found = metrics.rank_pairs(texts, videos, owner, scores=scores, elements=elements)
    dense = dense_dual_softmax(similar, 4.0), dense_dual_softmax(similar.T, 4.0)
    assert_ranks(found, texts, videos, owner, *dense)


def test_dual_softmax_tells_scores_apart_that_float32_cannot_hold():
    """At CLIP's scale of 100 a share of the softmax may be less than 1e-60."""
    query = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    candidates = unit(np.array([[-0.5, 0.8, 0.1], [-0.6, 0.8, 0], [0.1, 1, 0], [0.2, 1, 0]]))
    score = rescoring.dual_softmax(query, candidates, 100.0)
    scores = np.asarray(score(query @ candidates.T))
    dense = dense_dual_softmax(similarities(query, candidates), 100.0)
    assert np.abs(dense).min() < 1e-38 and np.isfinite(scores).all()
    np.testing.assert_array_equal(np.argsort(scores, axis=1), np.argsort(dense, axis=1))
    assert all(len(set(row)) == 4 for row in scores)


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("bank", [1, 30])
@pytest.mark.parametrize(("count", "videos"), SIZES)
def test_query_bank_equals_the_dense_one(count, videos, bank, elements):
    text_rows, video_rows, owner = random_pairs(count, videos, seed=count)
    bank_texts, bank_videos, _ = random_pairs(bank, bank, seed=bank + 100)
    similar = similarities(text_rows, video_rows)
    t2v = dense_query_bank(similar, similarities(bank_texts, video_rows))
    v2t = dense_query_bank(similar.T, similarities(bank_videos, text_rows))
    scores = (
        rescoring.query_bank(bank_texts, video_rows, elements=elements),
        rescoring.query_bank(bank_videos, text_rows, elements=elements),
    )
    found = metrics.rank_pairs(text_rows, video_rows, owner, scores=scores, elements=elements)
    assert_ranks(found, text_rows, video_rows, owner, t2v, v2t)


def test_a_hub_is_taken_down_and_others_are_left_alone():
    """Candidate 0 is near to every bank query: it loses the queries that are not its own."""
    hub, other, third = np.eye(3, dtype=np.float32)
    candidates = np.stack([hub, other, third])
    queries = unit(np.stack([hub + 0.9 * other, third]))
    bank = unit(np.stack([hub] * 5))
    score = rescoring.query_bank(bank, candidates)
    scores = np.asarray(score(queries @ candidates.T))
    assert (queries @ candidates.T)[0].argmax() == 0 and scores[0].argmax() == 1
    np.testing.assert_array_equal(scores[1], queries[1] @ candidates.T)  # its best is no hub


def test_re_scored_ranks_do_not_depend_on_the_order_of_queries():
    texts, videos, owner = random_pairs(30, 11)
    bank_texts, bank_videos, _ = random_pairs(9, 9, seed=5)

    def ranked(order):
        own = texts[order]
        for scores in (
            (rescoring.dual_softmax(own, videos, 20.0), rescoring.dual_softmax(videos, own, 20.0)),
            (rescoring.query_bank(bank_texts, videos), rescoring.query_bank(bank_videos, own)),
        ):
            found = metrics.rank_pairs(own, videos, owner[order], scores=scores)
            yield found.t2v, found.v2t_per_caption

    order = np.random.default_rng(1).permutation(30)
    for straight, shuffled in zip(ranked(np.arange(30)), ranked(order), strict=True):
        for a, b in zip(straight, shuffled, strict=True):
            np.testing.assert_array_equal(a[order], b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_banks_are_an_error(bad):
    texts, videos, _ = random_pairs(6, 6)
    texts[2, 0] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        rescoring.query_bank(texts, videos)
    with pytest.raises(FloatingPointError, match="not finite"):
        rescoring.dual_softmax(texts, videos, 100.0)
