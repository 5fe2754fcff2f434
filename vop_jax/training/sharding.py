"""Where arrays live on the mesh. The only file that names mesh axes."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vop_jax.errors import UserError
from vop_jax.tensorfile import Tree, flatten, unflatten

# The first pattern that matches a parameter's name places it. More axes are more entries.
PARAMETER_RULES: list[tuple[str, P]] = [
    (r".*", P()),  # replicated on every device
]


def make_mesh(data: int = -1) -> Mesh:
    """A mesh with the axis `data` over that many devices (-1: all).

    Raises:
        UserError: more devices asked for than there are.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if count > len(devices):
        raise UserError(f"config.mesh.data={data}: there are {len(devices)} devices")
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=devices[:count])


def check_batch(mesh: Mesh, key: str, batch_size: int) -> None:
    """Raises UserError when the mesh does not divide a global batch."""
    ways = mesh.shape["data"]
    if batch_size % ways:
        near = max(ways, batch_size // ways * ways)
        raise UserError(
            f"config.{key}={batch_size}: not a multiple of the {ways} devices of the data axis; "
            f"{near} or {near + ways} would be, or set mesh.data"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def parameter_shardings(mesh: Mesh, tree: Tree) -> dict[str, Any]:
    """The tree with every parameter replaced by its placement under PARAMETER_RULES."""
    placed = {}
    for name in flatten(tree):
        spec = next(spec for pattern, spec in PARAMETER_RULES if re.fullmatch(pattern, name))
        placed[name] = NamedSharding(mesh, spec)
    return unflatten(placed)


def place(mesh: Mesh, tree: Tree) -> dict[str, Any]:
    """A parameter tree as global arrays on the mesh."""
    return jax.device_put(dict(tree), parameter_shardings(mesh, tree))


def to_global(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch -> arrays of the global batch."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()
    }
