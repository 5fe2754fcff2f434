"""Where arrays live on the eight fake devices of the tests, and what each device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from vop_jax.config.base import base_config
from vop_jax.errors import UserError
from vop_jax.storage.tensors import flatten
from vop_jax.training import sharding
from vop_jax.training.sharding import make_mesh
from vop_jax.training.step import TrainState, make_optimizer
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import partition

TREE = {"clip": {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(1)}, "prompts": np.ones(5)}


def test_a_mesh_has_the_devices_of_the_config():
    sizes = {-1: 8, 1: 1, 4: 4, 8: 8}
    for data, devices in sizes.items():
        shape = dict(make_mesh(data).shape)
        assert shape == {"data": devices, "fsdp": 1, "model": 1}
    sharding.check_batch(make_mesh(), "train.batch_size", 24)
    for microbatches in (0, 6):
        sharding.check_microbatches(make_mesh(4), 48, microbatches)
    sharding.check_heads(make_mesh(1, 1, 8), {"visual": 16, "text": 8})


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: make_mesh(9), "config.mesh.data=9: takes 9 devices; available: 8"),
        (
            lambda: make_mesh(-1, 3, 1),
            "mesh.model=1: 3 does not divide the number of devices, 8; 1, 2, 4, 8",
        ),
        (
            lambda: make_mesh(4, 2, 2),
            "mesh.data=4, mesh.fsdp=2, mesh.model=2: takes 16 devices; available: 8",
        ),
        (
            lambda: sharding.check_batch(make_mesh(), "train.batch_size", 3),
            "config.train.batch_size=3: not a multiple of the 8 devices.*; 8 or 16 would",
        ),
        (
            lambda: sharding.check_batch(make_mesh(), "eval.batch_size", 33),
            "config.eval.batch_size=33: not a multiple of the 8 devices.*; 32 or 40 would",
        ),
        (
            lambda: sharding.check_microbatches(make_mesh(4), 48, 8),
            "config.train.microbatches=8: does not divide the 12 of train.batch_size=48 that each "
            "device has; 1, 2, 3, 4, 6, 12 would",
        ),
        (
            lambda: sharding.check_heads(make_mesh(1, 1, 8), {"visual": 12, "text": 8}),
            "mesh.model=8: does not divide the 12 attention heads of the visual tower; 1, 2, 4 w",
        ),
    ],
)
def test_what_these_devices_cannot_share_is_refused(check, message):
    with pytest.raises(UserError, match=message):
        check()


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([(".*", ("data", "rows"))], "'data' in .*axes are fsdp, model, or None"),
        ([(".*", ("fsdp", "rows"))], "'rows' in .*axes are fsdp, model, or None"),
        ([(".*", ("fsdp", None, "fsdp"))], "an axis can shard one dimension only"),
        ([("(", ("data",))], r"is not \(pattern, axes\)"),
        (["clip"], r"'clip' is not \(pattern, axes\)"),
        ([("clip/nothing", ("fsdp",))], r"'clip/nothing' matches no parameter; .* like clip/a"),
    ],
)
def test_a_wrong_placement_is_refused(placement, message):
    with pytest.raises(UserError, match=message):
        sharding.check_rules(sharding.placement_rules(placement), ["clip/a"])


def test_the_first_matching_rule_places_a_parameter(monkeypatch):
    rules = [(r"clip/a", P("data", None)), (r"clip/.*", P()), (r".*", P("data"))]
    monkeypatch.setattr(sharding, "PARAMETER_RULES", rules)
    placed = flatten(sharding.parameter_shardings(make_mesh(2), TREE))
    specs = {name: leaf.spec for name, leaf in placed.items()}
    # Two rows can be halved; five cannot, so they are whole.
    assert specs == {"clip/a": P("data", None), "clip/b": P(), "prompts": P(None)}


def placed_state(name, shape, placement=()):
    """(frozen parameters, train state) of a method on a mesh."""
    method, mesh = MethodConfig(name, frames=tiny.FRAMES), make_mesh(*shape)
    _, params = tiny.model_and_params(method)
    trainable, frozen = partition(params, method.trainable_patterns(tiny.CLIP))
    state = TrainState.create(trainable, make_optimizer(base_config().train))
    rules = sharding.placement_rules(placement)
    return sharding.place(mesh, frozen, rules), sharding.place(mesh, state, rules)


def bytes_on_first_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_frozen_weights_and_optimizer_state_are_sharded_over_fsdp():
    # What does not divide by 8, such as biases and positions, is whole on each device.
    for index, name in ((0, "vop"), (1, "full")):
        whole, sharded = (placed_state(name, shape)[index] for shape in ((8, 1, 1), (1, 8, 1)))
        assert bytes_on_first_device(sharded) < bytes_on_first_device(whole) / 3


def test_moments_live_where_their_parameter_does_and_the_configs_placement_goes_first():
    _, state = placed_state("full", (2, 2, 2))
    name = "clip/visual/transformer/resblocks.0/mlp/c_fc/kernel"
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    adam = next(node for node in nodes if hasattr(node, "mu"))
    expected = flatten(state.trainable)[name].sharding
    assert expected.spec == P("fsdp", "model")
    assert flatten(adam.mu)[name].sharding == flatten(adam.nu)[name].sharding == expected
    placement = [(r".*/token_embedding/embedding", (None, "model"))]
    frozen, _ = placed_state("vop", (4, 1, 2), placement)
    leaf = flatten(frozen)["clip/text/token_embedding/embedding"]
    assert leaf.sharding.spec == P(None, "model")


def test_rows_of_a_batch_are_sharded_in_order():
    rows, mesh = np.arange(48).reshape(16, 3), make_mesh(2, 2, 2)
    np.testing.assert_array_equal(sharding.process_rows(mesh, 16), np.arange(16))
    placed = sharding.to_global(mesh, {"rows": rows})["rows"]
    np.testing.assert_array_equal(placed, rows)
    size = 16 // sharding.row_shards(mesh)
    for shard in placed.addressable_shards:
        start = shard.index[0].indices(16)[0]
        assert start % size == 0 and len(shard.data) == size
        np.testing.assert_array_equal(shard.data, rows[start : start + size])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 8, 1)])
def test_devices_on_their_own_rows_give_the_same_values_and_gradients(shape):
    """Of parameters that are copied and of CLIP's, which are not."""
    mesh = make_mesh(*shape)
    rng = np.random.default_rng(0)
    tree = {"clip": {"w": rng.normal(size=(3, 4))}, "prompts": {"p": rng.normal(size=(2, 4))}}
    tree, frozen = jax.tree.map(np.float32, (tree, rng.normal(size=(1, 4))))
    rows = {"x": rng.normal(size=(16, 3)).astype(np.float32)}

    def function(tree, frozen, rows):
        y = rows["x"] @ tree["clip"]["w"] + frozen
        return jnp.tanh(y), jnp.einsum("bd,pd->b", y, tree["prompts"]["p"])

    def loss(run, tree, rows):
        a, b = run(tree, frozen, rows)
        assert a.shape == (16, 4) and b.shape == (16,)
        return ((a @ a.T) ** 2).sum() + (b * jnp.arange(16.0)).sum(), (a, b)

    run = sharding.map_rows_for_gradient(mesh, function)
    placed = jax.device_put(rows, sharding.batch_sharding(mesh))
    step = jax.grad(lambda tree: loss(run, tree, placed), has_aux=True)
    expected = jax.grad(lambda tree: loss(function, tree, rows), has_aux=True)(tree)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4),
        jax.jit(step)(tree),
        expected,
    )
