import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def names(tree, prefix=""):
    """The leaves' names, by hand."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from names(value, f"{prefix}{key}/")
        else:
            yield prefix + key


def assert_identical(a, b):
    assert sorted(names(a)) == sorted(names(b))
    assert all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@given(TREES, st.data())
def test_split_and_merge_are_inverses(tree, data):
    every = sorted(names(tree))
    chosen = data.draw(st.lists(st.sampled_from(every), unique=True))
    trainable, frozen = partition(tree, [re.escape(name) for name in chosen])
    assert sorted(names(trainable)) == sorted(chosen)
    assert sorted([*names(trainable), *names(frozen)]) == every
    assert_identical(merge(trainable, frozen), tree)


@given(TREES)
def test_everything_and_nothing(tree):
    assert_identical(partition(tree, [".*"])[0], tree)
    assert partition(tree, [".*"])[1] == {}
    assert partition(tree, [])[0] == {}


@given(TREES)
def test_count_adds_up(tree):
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert parameter_count(tree) == total
    name = sorted(names(tree))[0]
    left_out, _ = partition(tree, [re.escape(name)])
    rest = parameter_count(tree, [(re.escape(name), 0)])
    assert rest == total - parameter_count(left_out)


def test_patterns_match_whole_names():
    trainable, frozen = partition(TREE, [r"clip/.*/bias", "prompts/visual"])
    assert sorted(names(trainable)) == ["clip/visual/bias", "prompts/visual"]
    assert sorted(names(frozen)) == ["clip/logit_scale", "clip/visual/kernel"]


@pytest.mark.parametrize("pattern", ["visual", "prompts/text", "prompts", "Clip/.*", ""])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    with pytest.raises(ValueError, match=rf"pattern '{pattern}' matches no parameter"):
        partition(TREE, ["clip/.*", pattern])


def test_a_parameter_in_both_trees_is_an_error():
    trainable, frozen = partition(TREE, ["prompts/.*"])
    twice = {**frozen, "prompts": {"visual": 0}}
    with pytest.raises(ValueError, match="in both trees: prompts/visual"):
        merge(trainable, twice)
