"""What each device does with its own rows, and its gradients, summed over devices once a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vop_jax.storage.tensors import Tree, flatten, unflatten
from vop_jax.training import sharding


def on_own_rows(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(whole, rows) -> rows`, run by every device on its rows.

    Where parameters are whole on every device, each runs the program of one device, kernels
    included. Where the mesh cuts them the compiler shares the work out.
    """
    if sharding.row_shards(mesh) == 1 or sharding.cuts_parameters(mesh):
        return function
    own = sharding.on_row_shards(mesh, lambda rows, whole: function(whole, rows))
    return lambda whole, rows: own(rows, whole)


def each_on_its_own(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(trainable, frozen, rows) -> rows`, run by every device on its rows and prompts.

    The same values; but the gradient of what is added to CLIP is summed over a device's rows
    first and then over devices, once a step. Left to itself the compiler sums over devices
    wherever a parameter is used: at every layer that shares it. CLIP's own parameters are used
    once each, and not copied where the compiler shares the work out.
    """
    ways = sharding.row_shards(mesh)
    if ways == 1 or not sharding.cuts_parameters(mesh):
        own = on_own_rows(mesh, lambda whole, rows: function(*whole, rows))
        return lambda trainable, frozen, rows: own((trainable, frozen), rows)
    over = sharding.batch_sharding(mesh)

    def placed(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, over)

    def run(trainable: Tree, frozen: Tree, rows: Any) -> Any:
        flat = flatten(trainable)
        axes = {name: None if name.startswith("clip/") else 0 for name in flat}
        for name, axis in axes.items():
            if axis == 0:
                flat[name] = placed(jnp.broadcast_to(flat[name], (ways, *flat[name].shape)))
        parts = jax.tree.map(lambda x: placed(x.reshape(ways, -1, *x.shape[1:])), rows)
        each = jax.vmap(function, (unflatten(axes), None, 0), spmd_axis_name=sharding.ROWS)
        found = each(unflatten(flat), frozen, parts)
        return jax.tree.map(lambda x: placed(x.reshape(-1, *x.shape[2:])), found)

    return run
