"""What compiled programs send between the eight fake devices; above all the training step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import Collective, collectives
from tests import tiny
from vop_jax.config.base import base_config
from vop_jax.model import TextVideoModel
from vop_jax.storage.tensors import unflatten
from vop_jax.training import sharding, step
from vop_jax.training.step import make_optimizer
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import partition

# Two layers, so that a part that layers share is used more than once.
CLIP = dataclasses.replace(tiny.CLIP, vision_layers=2, text_layers=1)
MESH = jax.make_mesh((2, 4), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)


def of_local(function, x, out, varying=True):
    """The collectives of `function`, run by each device on its part of [8, …] rows."""
    mapped = jax.shard_map(
        function, mesh=MESH, in_specs=P(("x", "y")), out_specs=out, check_vma=varying
    )
    return collectives(jax.jit(mapped).lower(x).compile().as_text())


def gather(x):
    return jax.lax.all_gather(x, "y", tiled=True)


RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.mark.parametrize(
    ("function", "shape", "out", "kind", "group", "sent"),
    [
        (lambda x: jax.lax.psum(x, ("x", "y")), (8, 15), P(), "all-reduce", 8, 2 * 7 / 8 * 60),
        (lambda x: jax.lax.psum(x, "x"), (8, 6), P("y"), "all-reduce", 2, 2 / 2 * 24),
        (lambda x: jax.lax.psum(x, "y"), (8, 6), P("x"), "all-reduce", 4, 2 * 3 / 4 * 24),
        # A gather is as large as its result, a scatter as its operand.
        (gather, (8, 6), P("x"), "all-gather", 4, 3 / 4 * 4 * 24),
        (
            lambda x: jax.lax.psum_scatter(x[0], "y", tiled=True),
            *((8, 16, 3), P(("x", "y")), "reduce-scatter", 4, 3 / 4 * 4 * 16 * 3),
        ),
        (
            lambda x: jax.lax.ppermute(x, "y", RING),
            *((8, 6), P(("x", "y")), "collective-permute", 4, 24),
        ),
        (
            lambda x: jax.lax.all_to_all(x, "y", 1, 0, tiled=True),
            *((8, 16), P(("x", "y")), "all-to-all", 4, 3 / 4 * 64),
        ),
    ],
)
def test_what_one_operation_sends(function, shape, out, kind, group, sent):
    listed = of_local(function, jnp.ones(shape), out, varying=kind != "all-gather")
    assert {(c.kind, c.dtype, c.times) for c in listed} == {(kind, "f32", 1)}
    assert sum(c.sent for c in listed) == sent
    if kind != "collective-permute":
        assert {c.group for c in listed} == {group}


def test_sums_that_the_compiler_joined_are_several():
    def joined(x):
        return jax.lax.psum((x, x[:, :2] * 3), ("x", "y"))

    def waiting_for_each_other(x):
        first = jax.lax.psum(x, ("x", "y"))
        return jax.lax.psum(jnp.tanh(first) * x, ("x", "y"))

    assert sorted(c.shape for c in of_local(joined, jnp.ones((8, 6)), P())) == [(1, 2), (1, 6)]
    listed = of_local(waiting_for_each_other, jnp.ones((8, 3, 5)), P(), varying=False)
    assert [c.kind for c in listed] == ["all-reduce"] * 2


def test_in_a_loop_it_counts_every_turn_if_their_number_is_known():
    def five(x):
        def turn(carry, _):
            return jax.lax.psum(carry, "y") / 4, None

        return jax.lax.scan(turn, x, length=5)[0]

    def unknown(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "y"), x)

    (listed,) = of_local(five, jnp.ones((8, 6)), P(("x", "y")), varying=False)
    assert listed.times == 5 and listed.sent == 5 * 2 * 3 / 4 * 24
    listed = of_local(unknown, jnp.ones((8, 6)), P(("x", "y")), varying=False)
    assert {c.times for c in listed} == {None}
    with pytest.raises(ValueError, match="unknown length"):
        _ = listed[0].sent


def test_a_program_of_one_device_sends_nothing():
    assert collectives(jax.jit(lambda x: x @ x.T).lower(jnp.ones((3, 3))).compile().as_text()) == []


STARTED = """HloModule m, is_scheduled=true, num_partitions=16

%part (p: f32[2,8]) -> f32[32,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %g.1 = f32[32,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=1, replica_groups={}
}

ENTRY %main (a: f32[2,8]) -> f32[] {
  %a = f32[2,8]{1,0} parameter(0)
  %s = (f32[2,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%a), channel_id=1, replica_groups={}
  %d = f32[32,8]{1,0} all-gather-done(%s)
  %t = ((f32[2]{0}, bf16[3]{0}), (f32[8]{0}, bf16[12]{0})) all-gather-start(%b, %c), \
channel_id=2, replica_groups=[4,4]<=[16], metadata={op_name="jit(f)/two"}
  %r = (f32[5]{0}, f32[]) all-reduce-start(%x, %y), channel_id=3, \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1':(2)4}, to_apply=%add
  %c.1 = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=4, \
source_target_pairs={{0,1},{1,0}}
  %f = f32[32,8]{1,0} fusion(%a), kind=kCustom, calls=%part
}
"""


def test_started_collectives_as_gpus_and_tpus_write_them():
    """Not compiled here, for want of their compilers; shapes as in their modules."""
    listed = [(c.kind, c.dtype, c.shape, c.group) for c in collectives(STARTED)]
    assert listed == [
        ("all-gather", "f32", (32, 8), 16),  # once, though %part writes it again
        ("all-gather", "f32", (8,), 4),
        ("all-gather", "bf16", (12,), 4),
        ("all-reduce", "f32", (5,), 4),
        ("all-reduce", "f32", (), 4),
        ("collective-permute", "f32", (7,), 16),
    ]
    assert collectives(STARTED)[1].where == "jit(f)/two"


def step_of(name, per_device=2, shape=(-1, 1, 1)):
    """(the collectives of a method's compiled step, its trainable shapes, its global batch)."""
    mesh = sharding.make_mesh(*shape)
    small = dict(visual_prompts=4, specific_prompts=2, text_prefix=1, text_suffix=1)
    method = dataclasses.replace(MethodConfig(name, frames=tiny.FRAMES), **small)
    model = TextVideoModel(CLIP, method)
    count = per_device * mesh.size
    rows = {
        "frames": tiny.frames(count),
        "ids": tiny.captions(count, method.text_slots(CLIP)),
    }
    trainable, frozen = partition(unflatten(model.shapes()), method.trainable_patterns(CLIP))
    optimizer = make_optimizer(base_config().train)
    state = jax.eval_shape(lambda tree: step.TrainState.create(tree, optimizer), trainable)

    def placed(tree, over):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over), tree)

    whole = sharding.replicated(mesh)
    lowered = jax.jit(step.make_train_step(model, optimizer, mesh)).lower(
        placed(state, whole), placed(frozen, whole), placed(rows, sharding.batch_sharding(mesh))
    )
    listed = collectives(lowered.compile().as_text())
    return listed, jax.tree.leaves(trainable), count


def assert_only_what_it_must(listed: list[Collective], trainable, count):
    """Embeddings once forth and once back, each trained parameter's gradient once, and rows [B]."""
    embeddings = count * CLIP.embed_dim
    large = sorted(c.bytes for c in listed if c.bytes > 4 * count)
    of_trainable = sorted(4 * x.size for x in trainable if 4 * x.size > 4 * count)
    assert large == sorted([4 * embeddings, 4 * embeddings, *of_trainable])
    assert {c.times for c in listed} == {1} and {c.group for c in listed} == {8}
    kinds = [c.kind for c in listed if c.bytes == 4 * embeddings and "dot_general" in c.where]
    assert kinds.count("all-gather") == 1 and {*kinds} <= {"all-gather", "all-reduce"}
    small = sum(c.bytes for c in listed if c.bytes <= 4 * count)
    assert small <= 4 * (3 * count + sum(x.size for x in trainable if x.size <= count) + 2)


TRAINED = [name for name, method in METHODS.items() if method.trainable]
QUICK = ("vop_c",)  # has most parts that layers share


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED],
)
def test_a_step_sends_embeddings_and_the_gradient_and_nothing_else(name):
    assert_only_what_it_must(*step_of(name))


def test_left_to_the_compiler_a_step_of_context_sends_more(monkeypatch):
    """Else the test above could not fail, and `map_rows_for_gradient` would be of no use."""
    monkeypatch.setattr(step, "map_rows_for_gradient", lambda mesh, function: function)
    listed, trainable, count = step_of("vop_c")
    with pytest.raises(AssertionError):
        assert_only_what_it_must(listed, trainable, count)


@pytest.mark.slow
def test_on_a_mesh_that_cuts_parameters_the_gradient_of_context_is_summed_once(monkeypatch):
    """Of copies, that is; left to the compiler it is summed at every layer."""

    def sums():
        listed, trainable, _ = step_of("vop_c", shape=(2, 2, 2))
        largest = max(x.size for x in trainable)
        large = [c for c in listed if c.kind in ("all-reduce", "reduce-scatter")]
        return sum(c.times * c.bytes for c in large if c.bytes >= largest)

    copies = sums()
    monkeypatch.setattr(step, "map_rows_for_gradient", lambda mesh, function: function)
    assert copies < sums()
