"""Partition and merge are inverses, on any tree."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vop_jax.storage.tensors import flatten
from vop_jax.tuning.partition import merge, parameter_count, partition

NAMES = st.text("abc.", min_size=1, max_size=3)
LEAVES = st.integers(0, 9).map(lambda size: np.full(size, size))
TREES = st.dictionaries(
    NAMES,
    st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)
TREE = {
    "clip": {
        "visual": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)},
        "logit_scale": np.ones(()),
    },
    "prompts": {"visual": np.ones((1, 2, 3))},
}


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@given(TREES, st.data())
def test_partition_and_merge_are_inverses(tree, data):
    names = sorted(flatten(tree))
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
    patterns = [re.escape(name) for name in chosen]
    trainable, frozen = partition(tree, patterns)
    assert sorted(flatten(trainable)) == sorted(chosen)
    assert sorted([*flatten(trainable), *flatten(frozen)]) == names
    assert_identical(merge(trainable, frozen), tree)
    assert_identical(partition(tree, [".*"]), (tree, {}))
    # Counts add up; a factor of 0 leaves parameters out.
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert parameter_count(tree) == total
    rest = parameter_count(tree, [(pattern, 0) for pattern in patterns])
    assert rest == total - parameter_count(trainable)


@pytest.mark.parametrize("pattern", ["visual", "prompts/text", "prompts", "Clip/.*", ""])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(ValueError, match=rf"pattern '{pattern}' matches no parameter"):
        partition(TREE, ["clip/.*", pattern])


def test_a_parameter_in_both_trees_is_an_error():
    trainable, frozen = partition(TREE, ["prompts/.*"])
    with pytest.raises(ValueError, match="in both trees: prompts/visual"):
        merge(trainable, {**frozen, "prompts": {"visual": 0}})
