"""The blocks themselves: their size, their number of programs, groups that have no own."""

import jax
import numpy as np
import pytest

from tests.evaluation.embeddings import random_pairs
from vop_jax.evaluation import ranks


def largest(jaxpr):
    """The elements of the largest array that a traced program makes, in its loops too."""
    found = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(found, default=0)


@pytest.fixture
def traced(monkeypatch):
    """{name of a block program: the largest array of each call}."""
    sizes = {}
    for name in ("_rank_block", "_log_sum_block"):
        program = getattr(ranks, name)

        def spied(*args, name=name, program=program):
            sizes.setdefault(name, []).append(largest(jax.make_jaxpr(program)(*args).jaxpr))
            return program(*args)

        monkeypatch.setattr(ranks, name, spied)
    return sizes


@pytest.mark.parametrize(("elements", "blocks"), [(120, 20), (600, 4), (10**6, 1)])
def test_nothing_larger_than_the_bound_is_made(traced, elements, blocks):
    texts, videos, owner = random_pairs(120, 20, width=2)
    ranks.own_ranks(videos, texts, np.arange(20), owner, elements=elements)
    ranks.log_sums(videos, texts, 1.0, elements=elements)
    for sizes in traced.values():
        bound = min(elements, 120 * 20)  # a block of one query has 120
        assert len(sizes) == blocks and max(sizes) >= bound  # else it saw nothing
        assert max(sizes) <= max(bound, 240)  # beside blocks the candidates themselves, [120, 2]


def test_blocks_share_one_program_also_the_last():
    texts, videos, owner = random_pairs(103, 13, width=3)
    before = ranks._rank_block._cache_size()
    for _ in range(2):
        ranks.own_ranks(texts, videos, owner, np.arange(13), elements=13 * 10)
    assert ranks._rank_block._cache_size() == before + 1


def test_only_pairs_of_one_group_are_ranked():
    """Groups may have no query, no candidate, or several of both."""
    queries, candidates, _ = random_pairs(5, 4, width=3)
    of_query, of_candidate = np.array([7, 2, 2, 5, 9]), np.array([2, 9, 2, 4])
    query, candidate, rank = ranks.own_ranks(queries, candidates, of_query, of_candidate)
    pairs = [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1)]
    assert sorted(zip(query.tolist(), candidate.tolist(), strict=True)) == pairs
    for q, c, r in zip(query, candidate, rank, strict=True):
        others = of_candidate != of_query[q]
        similar = candidates @ queries[q]
        assert r == 1 + (similar[others] > similar[c]).sum()


def test_similarities_are_not_rounded_to_a_faster_format():
    """Two candidates that differ in the last bits keep their order."""
    query = np.ones((1, 64), np.float32)
    candidates = np.full((2, 64), 0.1, np.float32)
    candidates[1, 0] += 1e-5
    _, _, rank = ranks.own_ranks(query, candidates, np.array([1]), np.array([0, 1]))
    assert rank[0] == 1
    _, _, rank = ranks.own_ranks(query, candidates, np.array([0]), np.array([0, 1]))
    assert rank[0] == 2


@pytest.mark.parametrize("elements", [1, 40, 10**6])
def test_log_sums_equal_the_dense_ones(elements):
    queries, candidates, _ = random_pairs(17, 6)
    logits = 100 * queries.astype(np.float64) @ candidates.T
    expected = np.log(np.exp(logits).sum(axis=0))
    found = ranks.log_sums(queries, candidates, 100.0, elements=elements)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
