"""Ranks of both directions and re-scored ranks, against their definitions written out."""

import itertools
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.evaluation import metrics, ranks
from vop_jax.evaluation.ranks import best_candidates, pair_ranks

ALL_PROTOCOLS = ("t2v", "v2t", "v2t_per_caption", "v2t_grouped")


@st.composite
def pairs(draw):
    """(texts, videos, video of each text, elements): exact similarities in float32, many equal."""
    few_sizes = [(5, 5, 4), (11, 5, 4), (11, 5, 10**6), (7, 1, 10**6)]  # so few programs
    count, videos, elements = draw(st.sampled_from(few_sizes))
    more = draw(st.lists(st.integers(0, videos - 1), min_size=6, max_size=6))
    owner = np.array(draw(st.permutations([*range(videos), *more[: count - videos]])))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    texts, candidates = (rng.integers(-4, 5, (n, 2)) / np.float32(8) for n in (count, videos))
    return texts.astype(np.float32), candidates.astype(np.float32), owner, elements


def memory_of(elements):
    """Inside, so many similarities are in memory at once."""
    return mock.patch.object(ranks, "max_elements", lambda: elements)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_pairs(texts, videos, seed=0, width=8, similar=1.0):
    """Unit rows in general position; texts lie near their videos, several per video."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.arange(texts) % videos)
    video_rows = rng.standard_normal((videos, width))
    text_rows = similar * video_rows[owner] + rng.standard_normal((texts, width))
    return unit(text_rows), unit(video_rows), owner


def dense(texts, videos):
    """float64 [N, M]."""
    return texts.astype(np.float64) @ videos.astype(np.float64).T


def rank_bounds(scores, own, others, slack):
    """The least and greatest rank of candidate `own`, if scores are known to a part of `slack`."""
    target, rest = scores[own], scores[others]
    margin = slack * np.maximum(np.abs(rest), abs(target))
    ties = (np.abs(rest - target) <= margin).sum()
    better = (rest > target + margin).sum()
    return 1 + better + (0 if slack else ties / 2), 1 + better + (ties if slack else ties / 2)


def definition(t2v, v2t, owner, slack=0.0):
    """{protocol: [2, queries]}: bounds on the ranks of scores [N, M] and [M, N]."""
    texts, videos = np.arange(len(owner)), np.arange(len(v2t))
    bounds = {
        "t2v": [rank_bounds(t2v[i], j, videos != j, slack) for i, j in enumerate(owner)],
        "v2t_per_caption": [rank_bounds(v2t[owner[i]], i, owner != owner[i], slack) for i in texts],
    }
    best = [np.min([bounds["v2t_per_caption"][i] for i in texts[owner == j]], 0) for j in videos]
    groups = np.stack([v2t[:, owner == j].max(axis=1) for j in videos], axis=1)
    grouped = [rank_bounds(groups[j], j, videos != j, slack) for j in videos]
    bounds |= {"v2t": best, "v2t_grouped": grouped}
    return {name: np.array(rows).T for name, rows in bounds.items()}


def assert_ranks(found, expected):
    for name in ALL_PROTOCOLS:
        low, high = expected[name]
        assert (low <= getattr(found, name)).all() and (getattr(found, name) <= high).all(), name


@settings(max_examples=40, deadline=None)
@given(pairs(), st.integers(0, 100))
def test_ranks_equal_the_definition_whatever_the_order_of_queries(drawn, seed):
    texts, videos, owner, elements = drawn
    with memory_of(elements):
        found = metrics.rank_pairs(texts, videos, owner)
    similar = dense(texts, videos)
    assert_ranks(found, definition(similar, similar.T, owner))
    rng = np.random.default_rng(seed)
    of_texts, of_videos = rng.permutation(len(texts)), rng.permutation(len(videos))
    moved = np.argsort(of_videos)[owner[of_texts]]
    with memory_of(elements):
        shuffled = metrics.rank_pairs(texts[of_texts], videos[of_videos], moved)
    for name in ALL_PROTOCOLS:
        order = of_texts if name in ("t2v", "v2t_per_caption") else of_videos
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(found, name)[order])


@pytest.mark.parametrize("elements", [900, 10**6])
def test_equal_embeddings_rank_at_chance(elements):
    """Also where similarities are rounded, and an own one comes from another tile than its rivals.

    Equal rows must have equal similarities, to the bit.
    """
    same = np.repeat(random_pairs(1, 1, width=512)[0], 101, axis=0)
    with memory_of(elements):
        found = metrics.rank_pairs(same, same, np.arange(101))
    assert set(found.t2v) == set(found.v2t) == {51}  # the mean rank, not 1


@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_similarities_are_an_error(side):
    """In the first of the tiles and in the last."""
    for row, bad in itertools.product(range(6), (np.nan, np.inf)):
        *rows, owner = random_pairs(6, 6)
        rows[side][row, 1] = bad
        texts, videos = rows
        for call, arguments in (
            (metrics.rank_pairs, (texts, videos, owner)),
            (best_candidates, (texts, videos, 1)),
            (metrics.query_bank, (texts, videos, videos)),
            (metrics.dual_softmax, (texts, videos, 100.0)),
        ):
            with memory_of(24), pytest.raises(FloatingPointError, match="not finite"):
                call(*arguments)
        with pytest.raises(FloatingPointError, match="not finite"):
            metrics.contrast_accuracy(texts, texts[::-1], videos, owner)


@pytest.mark.parametrize("owner", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_a_video_without_a_caption_is_refused(owner):
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="every video"):
        metrics.rank_pairs(rows, rows, np.array(owner))


# ---- Re-scored ranks, over the whole matrix in float64


def dense_dual_softmax(similar, scale):
    """[Q, C] -> [Q, C]."""
    share = np.exp(scale * similar)
    return similar * share / share.sum(axis=0, keepdims=True)


def dense_query_bank(similar, of_bank, beta=20.0):
    """[Q, C], [B, C] -> [Q, C], as in the authors' dynamic_inverted_softmax."""
    activated = np.isin(similar.argmax(axis=1), of_bank.argmax(axis=1))
    normalised = np.exp(beta * similar) / np.exp(beta * of_bank).sum(axis=0, keepdims=True)
    return np.where(activated[:, None], normalised, similar)


def check_dual_softmax(texts, videos, owner, scale, elements):
    with memory_of(elements):
        scores = (
            metrics.dual_softmax(texts, videos, scale),
            metrics.dual_softmax(videos, texts, scale),
        )
        found = metrics.rank_pairs(texts, videos, owner, scores=scores)
    similar = dense(texts, videos)
    expected = dense_dual_softmax(similar, scale), dense_dual_softmax(similar.T, scale)
    assert_ranks(found, definition(*expected, owner, slack=1e-5))


@pytest.mark.parametrize("elements", [30, 10**6])
def test_re_scored_ranks_equal_the_dense_ones(elements):
    texts, videos, owner = random_pairs(23, 9)
    for scale in (1.0, 20.0):
        check_dual_softmax(texts, videos, owner, scale, elements)
    bank_texts, bank_videos, _ = random_pairs(3, 3, seed=1)  # few: it activates some queries only
    with memory_of(elements):
        scores = (
            metrics.query_bank(bank_texts, texts, videos),
            metrics.query_bank(bank_videos, videos, texts),
        )
        found = metrics.rank_pairs(texts, videos, owner, scores=scores)
    similar = dense(texts, videos)
    expected = (
        dense_query_bank(similar, dense(bank_texts, videos)),
        dense_query_bank(similar.T, dense(bank_videos, texts)),
    )
    assert_ranks(found, definition(*expected, owner, slack=1e-5))


@settings(max_examples=15, deadline=None)
@given(pairs())
def test_dual_softmax_of_ties_zeros_and_negative_similarities(drawn):
    check_dual_softmax(*drawn[:3], 4.0, drawn[3])


def test_dual_softmax_orders_scores_that_float32_cannot_hold():
    """At CLIP's scale of 100 a share of the softmax may be less than 1e-60."""
    queries = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    candidates = unit(np.array([[-0.5, 0.8, 0.1], [-0.6, 0.8, 0], [0.1, 1, 0], [0.2, 1, 0]]))
    score = metrics.dual_softmax(queries, candidates, 100.0)
    scores = np.asarray(
        score.function(queries @ candidates.T, score.of_query[:, None], score.of_candidate)
    )
    expected = dense_dual_softmax(dense(queries, candidates), 100.0)
    assert np.abs(expected).min() < 1e-38 and np.isfinite(scores).all()
    np.testing.assert_array_equal(np.argsort(scores, axis=1), np.argsort(expected, axis=1))
    assert all(len(set(row)) == 4 for row in scores)


# ---- Metrics


def test_half_ranks_of_ties_are_outside_the_recall_below_them():
    summary = metrics.summarize(np.array([1.0, 1.5, 5.0, 5.5, 11.0]))
    assert summary == {"R@1": 20.0, "R@5": 60.0, "R@10": 80.0, "MnR": 4.8, "MdR": 5.0}


def test_intervals_are_those_of_drawing_videos_with_all_their_captions():
    rng = np.random.default_rng(0)
    size = rng.integers(1, 6, 200)
    owner = np.repeat(np.arange(200), size)
    ranks = 1 + np.floor(rng.exponential(rng.lognormal(1, 1.5, 200)[owner]))
    found = metrics.recall_intervals(ranks, owner)
    drawn = rng.integers(0, 200, (4000, 200))
    for k in metrics.RECALLS:
        hits = np.bincount(owner, ranks <= k)
        shares = 100 * hits[drawn].sum(1) / size[drawn].sum(1)
        np.testing.assert_allclose(found[f"R@{k}"], np.percentile(shares, (2.5, 97.5)), atol=0.7)
        assert found[f"R@{k}"][0] < metrics.summarize(ranks)[f"R@{k}"] < found[f"R@{k}"][1]
    alone = metrics.recall_intervals(ranks, np.arange(len(ranks)))["R@10"]
    assert np.ptp(alone) < np.ptp(found["R@10"])  # captions of one video succeed or fail together
    assert metrics.recall_intervals(ranks, owner) == found


def test_contrast_accuracy_counts_captions_closer_than_their_contrast():
    videos = np.eye(2, dtype=np.float32)
    texts = videos[[0, 0, 1, 1]]
    contrasts = np.array([[0, 1], [1, 0], [0.6, 0.8], [0, -1]], np.float32)
    # Closer, equal, closer, closer; in the other order: farther, equal, farther, farther.
    assert metrics.contrast_accuracy(texts, contrasts, videos, np.array([0, 0, 1, 1])) == 87.5


@pytest.mark.parametrize("elements", [10, 1000])
def test_best_candidates_are_the_nearest_best_first(elements):
    rng = np.random.default_rng(0)
    texts = rng.integers(-2, 3, (7, 3)).astype(np.float32)
    videos = rng.integers(-2, 3, (5, 3)).astype(np.float32)
    with memory_of(elements):
        rows, similarities = best_candidates(texts, videos, 3)
    for text, row, similar in zip(texts, rows, similarities, strict=True):
        expected = sorted(range(5), key=lambda j: (-(text @ videos[j]), j))[:3]
        assert list(row) == expected
        assert list(similar) == [text @ videos[j] for j in expected]
    assert best_candidates(texts, videos, 9)[0].shape == (7, 5)


# ---- Memory


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 10**7))
def test_a_tile_is_within_the_bound_and_no_higher_than_wide(texts, videos, elements):
    high, wide = ranks.tile_sizes(texts, videos, elements)
    assert 1 <= high <= texts and 1 <= wide <= videos and high * wide <= elements
    # The columns of a tile's texts are neighbours: one tile holds them all.
    assert high <= wide or wide == videos
    if texts * videos <= elements:
        assert (high, wide) == (texts, videos)


def test_every_similarity_is_computed_once_and_own_ones_once_more(monkeypatch):
    shapes, tile = [], ranks._tile

    def spied(*args):
        found = tile(*args)
        shapes.append(found[0].shape)
        return found

    monkeypatch.setattr(ranks, "_tile", spied)
    monkeypatch.setattr(ranks, "max_elements", lambda: 100)
    before = tile._cache_size(), ranks._count._cache_size()
    texts, videos, owner = random_pairs(50, 50, width=3)
    pair_ranks(texts, videos, owner)
    assert shapes == [(10, 10)] * (5 * 5 + 5)
    # The last tiles are filled up: other sizes of data, but no others of tiles.
    pair_ranks(texts[:47], videos[:41], owner[:47] % 41)
    assert shapes == [(10, 10)] * 2 * (5 * 5 + 5)
    assert tile._cache_size() == before[0] + 1 and ranks._count._cache_size() <= before[1] + 2


def test_the_bound_suits_the_device(monkeypatch):
    for backend, count in {"cpu": 2**22, "gpu": 2**28, "tpu": 2**28}.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert ranks.max_elements() == count


def largest(jaxpr):
    """The elements of the largest array that a traced program makes, in its loops too."""
    sizes = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes, default=0)


@pytest.mark.parametrize("elements", [120, 600])
def test_nothing_larger_than_the_bound_is_computed(monkeypatch, elements):
    texts, videos, owner = random_pairs(120, 20, width=2)
    sizes = {}
    for name in ("_count", "_log_sum_block"):
        program = getattr(ranks, name)

        def spied(*args, name=name, program=program):
            sizes.setdefault(name, []).append(largest(jax.make_jaxpr(program)(*args).jaxpr))
            return program(*args)

        monkeypatch.setattr(ranks, name, spied)
    with memory_of(elements):
        pair_ranks(texts, videos, owner)
        sums = ranks.log_sums(videos, texts, 100.0)
    logits = 100 * dense(videos, texts)
    np.testing.assert_allclose(sums, np.log(np.exp(logits).sum(axis=0)), rtol=1e-5)
    assert len(sizes) == 2
    for found in sizes.values():
        # Beside tiles there are the ranks of all texts, and the candidates [120, 2].
        assert max(found) <= max(elements, 240)
    assert max(sizes["_log_sum_block"]) >= elements  # else nothing was seen
