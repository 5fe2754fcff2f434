"""Where arrays live on the mesh. The only file that names mesh axes.

    data    rows of a batch; parameters are whole on each of its devices
    fsdp    rows of a batch too; large parameters and their optimizer state are sharded over it
    model   attention heads and the MLP's inner width; its devices share one set of rows

The axes are in the order of distance: neighbours on `model` communicate most and are closest.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vop_jax.errors import UserError
from vop_jax.storage.tensors import Tree, flatten, unflatten

AXES = ("data", "fsdp", "model")
ROWS = ("data", "fsdp")  # the axes that rows of a batch are sharded over
SHARDING_AXES = ("fsdp", "model")  # those that parameters may be sharded over

# The first pattern that matches a parameter's name places it, one entry per dimension. A config's
# `mesh.placement` goes before these. An axis that does not divide its dimension is left out.
PARAMETER_RULES: list[tuple[str, P]] = [
    (r".*/attn/(query|key|value)/kernel", P("fsdp", "model", None)),  # [D, H, D/H]
    (r".*/attn/(query|key|value)/bias", P("model", None)),  # [H, D/H]
    (r".*/attn/out/kernel", P("model", None, "fsdp")),  # [H, D/H, D]
    (r".*/mlp/c_fc/kernel", P("fsdp", "model")),  # [D, 4 D]
    (r".*/mlp/c_fc/bias", P("model")),
    (r".*/mlp/c_proj/kernel", P("model", "fsdp")),  # [4 D, D]
    (r".*/token_embedding/embedding", P(None, "fsdp")),  # [vocabulary, D]
    (r".*/(proj|text_projection)/kernel", P(None, "fsdp")),  # [D, E]
    (r".*/conv1/kernel", P(None, None, None, "fsdp")),  # [patch, patch, 3, D]
    (r".*/context/lstm/(input|hidden)_kernel", P(None, None, "fsdp")),  # [directions, D, 4 D]
    (r".*/context/stretch/kernel", P(None, "fsdp")),  # [directions * D, P * D]
    (r".*", P()),  # whole on every device
]


def make_mesh(
    data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of data x fsdp x model devices; `data` -1 takes all devices that the others leave.

    Raises:
        UserError: there are fewer devices, or fsdp x model does not divide their number.
    """
    devices, inner = devices or jax.devices(), fsdp * model
    if data == -1 and len(devices) % inner:
        raise UserError(
            f"config.mesh.fsdp={fsdp}, mesh.model={model}: {inner} does not divide the "
            f"number of devices, {len(devices)}; {_divisors(len(devices))} would"
        )
    count = len(devices) if data == -1 else data * inner
    if count > len(devices):
        sizes = f"config.mesh.data={data}"
        sizes += f", mesh.fsdp={fsdp}, mesh.model={model}" if inner > 1 else ""
        raise UserError(f"{sizes}: takes {count} devices; available: {len(devices)}")
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"config.mesh.data={data}: {count} of the {len(devices)} devices of "
            f"{jax.process_count()} processes; a run of several takes all of them, use -1"
        )
    shape, kinds = (count // inner, fsdp, model), (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, kinds, devices=devices[:count])


def check_batch(mesh: Mesh, key: str, batch_size: int) -> None:
    """Raises UserError when the mesh does not divide a global batch."""
    shards = row_shards(mesh)
    if batch_size % shards:
        near = max(shards, batch_size // shards * shards)
        raise UserError(
            f"config.{key}={batch_size}: not a multiple of the {shards} devices of the data axis"
            f"{' and fsdp' if mesh.shape['fsdp'] > 1 else ''}; "
            f"{near} or {near + shards} would be, or set mesh.data"
        )


def check_microbatches(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises UserError when the rows of a device cannot be divided into that many equal parts.

    0 means that `training.compile` chooses the number.
    """
    rows = batch_size // row_shards(mesh)
    if microbatches and rows % microbatches:
        raise UserError(
            f"config.train.microbatches={microbatches}: does not divide the {rows} of "
            f"train.batch_size={batch_size} that each device has; {_divisors(rows)} would"
        )


def check_heads(mesh: Mesh, heads: Mapping[str, int]) -> None:
    """Raises UserError when the axis `model` does not divide the heads {tower: H}."""
    size = mesh.shape["model"]
    for tower, count in heads.items():
        if count % size:
            raise UserError(
                f"config.mesh.model={size}: does not divide the {count} attention heads of the "
                f"{tower} tower; {_divisors(math.gcd(*heads.values()))} would"
            )


def divisors(number: int) -> list[int]:
    """In rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _divisors(number: int) -> str:
    return ", ".join(map(str, divisors(number)))


def row_shards(mesh: Mesh) -> int:
    """The number of shards that the rows of a batch have."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def shards_parameters(mesh: Mesh) -> bool:
    """Whether some parameters are not whole on every device."""
    return any(mesh.shape[axis] > 1 for axis in SHARDING_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def placement_rules(
    placement: Sequence[tuple[str, Sequence[str | None]]],
) -> list[tuple[str, P]]:
    """The config's `mesh.placement`, then the built-in rules.

    Raises:
        UserError: an entry that is not (pattern, axes), with what is wrong about it.
    """
    rules = []
    for entry in placement:
        try:
            pattern, axes = entry
            regex, spec = re.compile(pattern), P(*axes)
        except (TypeError, ValueError, re.error) as error:
            raise UserError(
                f"config.mesh.placement: {entry!r} is not (pattern, axes): {error}"
            ) from None
        for axis in axes:
            if axis not in (*SHARDING_AXES, None):
                raise UserError(
                    f"config.mesh.placement: {axis!r} in {entry!r}: axes are "
                    f"{', '.join(SHARDING_AXES)}, or None for a dimension that is whole"
                )
        named = [axis for axis in axes if axis]
        if len(set(named)) < len(named):
            raise UserError(
                f"config.mesh.placement: {entry!r}: an axis can shard one dimension only"
            )
        rules.append((regex.pattern, spec))
    return [*rules, *PARAMETER_RULES]


def check_rules(rules: Sequence[tuple[str, P]], names: Sequence[str]) -> None:
    """Raises UserError for a pattern of `mesh.placement` that matches none of these names."""
    for pattern, _ in rules[: len(rules) - len(PARAMETER_RULES)]:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(
                f"config.mesh.placement: {pattern!r} matches no parameter; they are named like "
                f"{names[0]}"
            )


def parameter_shardings(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, P]] | None = None) -> Any:
    """The tree with every leaf replaced by its placement.

    A leaf's name is made of the dict keys that lead to it. So a moment in an optimizer's state has
    the name and the placement of its parameter; a leaf without a name, a count, is replicated.
    """

    def placement(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        spec = next(s for pattern, s in rules or PARAMETER_RULES if re.fullmatch(pattern, name))
        sizes = zip(spec, np.shape(leaf), strict=False)
        return NamedSharding(
            mesh, P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in sizes))
        )

    return jax.tree_util.tree_map_with_path(placement, tree)


def place(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, P]] | None = None) -> Any:
    """A tree of arrays, the same in every process, as global arrays on the mesh."""

    def place_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place_leaf, tree, parameter_shardings(mesh, tree, rules))


def to_host(tree: Any) -> Any:
    """A tree of global arrays as NumPy arrays; all processes of the run must call it."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils  # late, as one process has no use for it

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int [b], ascending: the rows of a global batch that this process's devices have."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch, see `process_rows` -> arrays of the global batch."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), dict(batch))


def map_row_shards(mesh: Mesh, compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute(shard, whole) -> rows` on every row shard, each result a shard of the output.

    `shard` is sharded as a batch is, `whole` is not.
    """
    specs = (P(ROWS), P())
    # Devices on the axis `model` compute the same on the same rows.
    return jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=P(ROWS), check_vma=False)


def row_shard_index() -> jax.Array:
    """Inside `map_row_shards`: the index of this shard."""
    return jax.lax.axis_index(ROWS)


def is_only_row_shard() -> bool:
    """Inside `map_row_shards`: whether there is no other shard."""
    return jax.lax.axis_size(ROWS) == 1


def sum_and_scatter_rows(rows: jax.Array) -> jax.Array:
    """Inside `map_row_shards`: sums all shards' [B, ...] and returns this shard's rows of it."""
    return jax.lax.psum_scatter(rows, ROWS, tiled=True)


def map_rows(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, rows) -> rows`, run by every device on its rows.

    Where parameters are whole on every device, each runs the program of one device, kernels
    included. Where the mesh shards them, the compiler distributes the work.
    """
    if row_shards(mesh) == 1 or shards_parameters(mesh):
        return function
    run = map_row_shards(mesh, lambda rows, params: function(params, rows))
    return lambda params, rows: run(rows, params)


def map_rows_for_gradient(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(trainable, frozen, rows) -> rows`, run by every device on its rows and prompts.

    The values are those of `function`; but the gradient of what is added to CLIP is summed over a
    device's rows first and then over devices, once a step. By itself the compiler sums over
    devices wherever a parameter is used: at every layer that shares it. CLIP's own parameters are
    used once each, so they are not copied where the compiler distributes the work.
    """
    shards = row_shards(mesh)
    if shards == 1 or not shards_parameters(mesh):
        run_whole = map_rows(mesh, lambda params, rows: function(*params, rows))
        return lambda trainable, frozen, rows: run_whole((trainable, frozen), rows)

    def shard(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    def run(trainable: Tree, frozen: Tree, rows: Any) -> Any:
        flat = flatten(trainable)
        axes = {name: None if name.startswith("clip/") else 0 for name in flat}
        for name, axis in axes.items():
            if axis == 0:
                flat[name] = shard(jnp.broadcast_to(flat[name], (shards, *flat[name].shape)))
        parts = jax.tree.map(lambda x: shard(x.reshape(shards, -1, *x.shape[1:])), rows)
        run_parts = jax.vmap(function, (unflatten(axes), None, 0), spmd_axis_name=ROWS)
        results = run_parts(unflatten(flat), frozen, parts)
        return jax.tree.map(lambda x: shard(x.reshape(-1, *x.shape[2:])), results)

    return run
