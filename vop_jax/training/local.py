"""Gradients summed by each device over its own rows first, and over devices once a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vop_jax.tensorfile import Tree, flatten, unflatten
from vop_jax.training import sharding


def each_on_its_own(
    mesh: Mesh, function: Callable[..., Any], loops: bool = False
) -> Callable[..., Any]:
    """`function(trainable, rows) -> rows`, run by every device on its rows and its own prompts.

    The same values; but the gradient of what is added to CLIP is summed over a device's rows
    first and then over devices, once a step. Left to itself the compiler sums over devices
    wherever a parameter is used: at every layer that shares it.
    CLIP's own parameters are used once each, and not copied.

    Args:
        loops: whether `function` takes its rows in parts. A parameter of CLIP is then used once a
            part, and copied as well, unless the mesh cuts it.
    """
    ways = sharding.row_shards(mesh)
    if ways == 1:
        return function
    over = sharding.batch_sharding(mesh)

    def placed(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, over)

    def run(trainable: Tree, rows: Any) -> Any:
        flat = flatten(trainable)
        once = not loops or sharding.cuts_parameters(mesh)
        axes = {name: None if once and name.startswith("clip/") else 0 for name in flat}
        for name, axis in axes.items():
            if axis == 0:
                flat[name] = placed(jnp.broadcast_to(flat[name], (ways, *flat[name].shape)))
        parts = jax.tree.map(lambda x: placed(x.reshape(ways, -1, *x.shape[1:])), rows)
        each = jax.vmap(function, in_axes=(unflatten(axes), 0), spmd_axis_name=sharding.ROWS)
        found = each(unflatten(flat), parts)
        return jax.tree.map(lambda x: placed(x.reshape(-1, *x.shape[2:])), found)

    return run
