"""The precision in which frozen parameters are held."""

import re
from typing import Any

import jax.numpy as jnp

from vop_jax.storage.tensors import Tree, flatten, unflatten

# The first pattern that matches a frozen parameter's name says whether it is cast to the compute
# dtype where it is used; it may then be held in it, half as large and with the same result.
CAST_AT_USE: list[tuple[str, bool]] = [
    (r".*/ln_\w+/(scale|bias)", False),  # a norm's float32 statistics are scaled in float32
    (r".*/(kernel|bias|embedding)", True),
    (r".*/(class|positional)_embedding", True),
    (r".*", False),  # logit_scale
]


def held(frozen: Tree, dtype: Any) -> dict[str, Any]:
    """The frozen tree, arrays or shapes, in the dtypes it is held in."""

    def in_dtype(name: str, leaf: Any) -> Any:
        cast = next(cast for pattern, cast in CAST_AT_USE if re.fullmatch(pattern, name))
        if not cast:
            return leaf
        if hasattr(leaf, "astype"):
            return leaf.astype(jnp.dtype(dtype))
        return leaf.update(dtype=jnp.dtype(dtype))

    return unflatten({name: in_dtype(name, leaf) for name, leaf in flatten(frozen).items()})
