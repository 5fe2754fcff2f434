"""On the eight fake devices of the tests."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vop_jax.errors import UserError
from vop_jax.storage.tensors import flatten
from vop_jax.training import sharding
from vop_jax.training.step import symmetric_cross_entropy

TREE = {"clip": {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(1)}, "prompts": np.ones(5)}


@pytest.mark.parametrize(("asked", "got"), [(-1, 8), (1, 1), (4, 4), (8, 8)])
def test_a_mesh_has_the_devices_asked_for(asked, got):
    assert dict(sharding.make_mesh(asked).shape) == {"data": got, "fsdp": 1, "model": 1}


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(UserError, match=r"config.mesh.data=9: takes 9 devices; available: 8"):
        sharding.make_mesh(9)


@pytest.mark.parametrize(("batch", "near"), [(12, "8 or 16"), (3, "8 or 16"), (33, "32 or 40")])
def test_a_batch_that_the_mesh_does_not_divide_is_an_error(batch, near):
    message = rf"config.train.batch_size={batch}: not a multiple of the 8 devices.*; {near} would"
    with pytest.raises(UserError, match=message):
        sharding.check_batch(sharding.make_mesh(), "train.batch_size", batch)


def test_a_batch_that_the_mesh_divides_is_fine():
    sharding.check_batch(sharding.make_mesh(), "train.batch_size", 24)
    sharding.check_batch(sharding.make_mesh(1), "train.batch_size", 7)


def test_parameters_are_on_every_device_whole():
    placed = sharding.place(sharding.make_mesh(), TREE)
    assert flatten(placed).keys() == flatten(TREE).keys()
    for name, leaf in flatten(placed).items():
        np.testing.assert_array_equal(leaf, flatten(TREE)[name])
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8


def test_the_first_matching_rule_places_a_parameter(monkeypatch):
    rules = [(r"clip/a", P("data", None)), (r"clip/.*", P()), (r".*", P("data"))]
    monkeypatch.setattr(sharding, "PARAMETER_RULES", rules)
    placed = flatten(sharding.parameter_shardings(sharding.make_mesh(2), TREE))
    specs = {name: leaf.spec for name, leaf in placed.items()}
    # Of 2 x 3 the rows can be halved; 5 cannot, so they are whole.
    assert specs == {"clip/a": P("data", None), "clip/b": P(), "prompts": P(None)}


def test_rows_of_a_batch_are_spread_in_order():
    rows = np.arange(48).reshape(16, 3)
    placed = sharding.to_global(sharding.make_mesh(), {"rows": rows})["rows"]
    np.testing.assert_array_equal(placed, rows)
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.device.id)
    for i, shard in enumerate(shards):
        np.testing.assert_array_equal(shard.data, rows[2 * i : 2 * i + 2])


def test_the_loss_is_over_the_global_batch():
    rng = np.random.default_rng(0)
    text, video = rng.normal(size=(2, 16, 6)).astype(np.float32)
    batch = sharding.to_global(sharding.make_mesh(), {"text": text, "video": video})
    step = jax.jit(jax.value_and_grad(symmetric_cross_entropy, argnums=(0, 1)))
    value, gradient = step(batch["text"], batch["video"], 3.0)
    alone, gradient_alone = step(text, video, 3.0)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    for a, b in zip(gradient, gradient_alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
