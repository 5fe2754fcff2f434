"""Frozen and trainable parameters are two trees: `partition` and `merge` are inverses.

Gradients, optimizer state and checkpoints have the structure of the trainable tree alone; the
frozen tree enters the step as a constant.
"""

import re
from collections.abc import Sequence
from typing import Any

from vop_jax.storage.tensors import Tree, flatten, unflatten


def partition(params: Tree, patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides a parameter tree into (trainable, frozen).

    A leaf is trainable when its "/"-joined name fully matches one of `patterns`.

    Raises:
        ValueError: a pattern matches no parameter, which is always a mistake.
    """
    flat = flatten(params)
    regexes = [re.compile(pattern) for pattern in patterns]
    for regex in regexes:
        if not any(regex.fullmatch(name) for name in flat):
            raise ValueError(f"trainable pattern {regex.pattern!r} matches no parameter")
    trainable = {k: v for k, v in flat.items() if any(r.fullmatch(k) for r in regexes)}
    frozen = {k: v for k, v in flat.items() if k not in trainable}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Tree, frozen: Tree) -> dict[str, Any]:
    """The whole tree, the inverse of `partition`.

    Raises:
        ValueError: a parameter is in both trees.
    """
    left, right = flatten(trainable), flatten(frozen)
    if both := left.keys() & right.keys():
        raise ValueError(f"in both trees: {sorted(both)[0]}")
    return unflatten({**left, **right})


def parameter_count(tree: Tree, factors: Sequence[tuple[str, int]] = ()) -> int:
    """The number of scalars in a tree.

    Args:
        factors: (pattern, factor) pairs; a leaf counts `factor` times if its name matches. The
            first match wins, a leaf without one counts once.
    """

    def factor(name: str) -> int:
        return next((f for pattern, f in factors if re.fullmatch(pattern, name)), 1)

    return sum(leaf.size * factor(name) for name, leaf in flatten(tree).items())
