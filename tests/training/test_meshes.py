"""The same losses and parameters on every mesh; what is cut over it takes less of each device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from benchmarks.collectives import collectives
from tests import tiny
from tests.clip.kernels import kernels
from vop_jax.config.base import base_config
from vop_jax.errors import UserError
from vop_jax.evaluation.evaluate import make_encoders
from vop_jax.storage.tensors import flatten
from vop_jax.training import sharding
from vop_jax.training.compile import CompiledStep
from vop_jax.training.step import TrainState, loss_and_gradient, make_optimizer, make_train_step
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import merge, partition

# (data, fsdp, model); compiling for eight devices takes its time, so one of a kind is quick.
MESHES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]
QUICK = [("vop_f+c", (2, 2, 2))]
CASES = [
    pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow)
    for name in ("vop", "vop_f+c", "full")
    for mesh in MESHES
]
BATCH, STEPS = 8, 3
OPENAI_SCALE = np.float32(4.6052)  # as in their ViT-B/32: ln 100


class Placed:
    """A method's parameters on a mesh."""

    def __init__(self, name, shape, rules=None):
        self.method = MethodConfig(name, frames=tiny.FRAMES, visual_prompts=2, specific_prompts=1)
        self.mesh = sharding.make_mesh(*shape)
        self.model, params = tiny.model_and_params(self.method)
        if name == "full":
            params["clip"]["logit_scale"] = OPENAI_SCALE
        config = base_config().train
        with config.unlocked():
            config.update(steps=STEPS, warmup=0.0)
        self.optimizer = make_optimizer(config)
        trainable, frozen = partition(params, self.method.trainable_patterns(tiny.CLIP))
        self.frozen = sharding.place(self.mesh, frozen, rules)
        self.state = sharding.place(self.mesh, TrainState.create(trainable, self.optimizer), rules)
        self.placement = jax.tree.map(lambda leaf: leaf.sharding, self.state)


class Trained(Placed):
    """The same after some steps."""

    def __init__(self, name, shape):
        super().__init__(name, shape)
        method, model = self.method, self.model
        step = CompiledStep(make_train_step(model, self.optimizer, self.mesh), self.mesh)
        self.losses = []
        slots = method.text_slots(tiny.CLIP)
        for k in range(STEPS):
            rows = {"frames": tiny.frames(BATCH, k), "ids": tiny.captions(BATCH, slots, k)}
            batch = sharding.to_global(self.mesh, rows)
            self.state, metrics = step(self.state, self.frozen, batch)
            self.losses.append(float(metrics["loss"]))
        encode_video, encode_text = make_encoders(model, self.mesh)
        whole = merge(self.state.trainable, self.frozen)
        self.videos = np.asarray(encode_video(whole, batch["frames"]))
        self.texts = np.asarray(encode_text(whole, batch["ids"]))


@functools.cache
def alone(name):
    return Trained(name, (1, 1, 1))


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_every_mesh_learns_the_same(name, shape):
    one, many = alone(name), Trained(name, shape)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(many.videos, one.videos, atol=1e-5)
    np.testing.assert_allclose(many.texts, one.texts, atol=1e-5)
    learnt = flatten(sharding.to_host(many.state.trainable))
    if name == "full":
        moved = learnt["clip/logit_scale"]
        assert moved.dtype == np.float32 and 0 < moved < OPENAI_SCALE - 1e-4
    # AdamW divides a gradient by its size: where it is nearly nought, rounding moves the parameter.
    # Of the 54 thousand of `full` a few are, by up to a fiftieth of what they moved.
    atol = 5e-4 if name == "full" else 1e-5
    for leaf, wanted in flatten(one.state.trainable).items():
        # A softmax does not feel the bias of its keys: the gradient is rounding, AdamW its sign.
        if not leaf.endswith("attn/key/bias"):
            np.testing.assert_allclose(learnt[leaf], wanted, atol=atol, err_msg=leaf)
    stays = jax.tree.map(
        lambda x, to: x.sharding.is_equivalent_to(to, x.ndim), many.state, many.placement
    )
    assert all(jax.tree.leaves(stays)), stays


def with_kernel(name):
    """(model, the same with the kernels, parameters) of a CLIP with heads as they take them."""
    method = MethodConfig(name, frames=tiny.FRAMES, visual_prompts=2, specific_prompts=1)
    clip = dataclasses.replace(tiny.CLIP, text_heads=1)  # of 16
    model, params = tiny.model_and_params(method, clip=clip)
    return model, model.clone(kernel="fused"), params


def test_kernels_embed_on_every_device(monkeypatch):
    plain, fused, params = with_kernel("vop")
    packed, _ = kernels.interpret(monkeypatch)
    mesh, frames = sharding.make_mesh(), tiny.frames(BATCH)
    encode_video, _ = make_encoders(fused, mesh)
    batch = sharding.to_global(mesh, {"frames": frames})
    video = encode_video(sharding.place(mesh, params), batch["frames"])
    rows = jax.jit(lambda p, x: plain.apply({"params": p}, x, method="encode_video"))
    np.testing.assert_allclose(video, rows(params, frames), atol=1e-5)
    own = tiny.FRAMES * BATCH // mesh.size  # frames of a device
    assert packed and {shape[0] for shape in packed} == {own}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vop", "vop_f+c"])
def test_kernels_run_on_every_device(monkeypatch, name):
    """Each reads its own rows: nothing is gathered for them, and what is learnt is the same."""
    plain, fused, params = with_kernel(name)
    clip, method, mesh = plain.clip_config, plain.method, sharding.make_mesh()
    batch = {"frames": tiny.frames(BATCH), "ids": tiny.captions(BATCH, method.text_slots(clip))}
    trees = partition(params, method.trainable_patterns(clip))
    wanted = jax.jit(functools.partial(loss_and_gradient, plain))(*trees, batch)
    packed, backward = kernels.interpret(monkeypatch)
    step = jax.jit(functools.partial(loss_and_gradient, fused, mesh=mesh))
    placed = sharding.place(mesh, trees), sharding.to_global(mesh, batch)
    program = step.lower(*placed[0], placed[1]).compile()
    found = program(*placed[0], placed[1])
    # Of gradients up to ten, at a temperature of a hundred.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)
    own = tiny.FRAMES * BATCH // mesh.size  # frames of a device
    assert packed[0] == (own, 5, 3, clip.vision_heads, 16) and "kernel" in backward
    assert sum(c.kind == "all-gather" for c in collectives(program.as_text())) == 1


def held(tree):
    """Bytes of a tree that the first device holds."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", [Placed, pytest.param(Trained, marks=pytest.mark.slow)])
def test_frozen_weights_and_optimizer_state_are_cut_over_fsdp(kind):
    whole, cut = (kind("full", shape) for shape in ((8, 1, 1), (1, 8, 1)))
    # What does not divide by 8, such as biases and positions, is whole on each device.
    assert held(cut.state.opt_state) < held(whole.state.opt_state) / 3
    vop = kind("vop", (1, 8, 1))
    assert held(vop.frozen) < held(kind("vop", (8, 1, 1)).frozen) / 3


@pytest.mark.parametrize("kind", [Placed, pytest.param(Trained, marks=pytest.mark.slow)])
def test_moments_live_where_their_parameter_does(kind):
    state = kind("full", (2, 2, 2)).state  # and stay there
    name = "clip/visual/transformer/resblocks.0/mlp/c_fc/kernel"
    moments = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))]
    adam = next(s for s in moments if hasattr(s, "mu"))
    wanted = flatten(state.trainable)[name].sharding
    assert wanted.spec == jax.P("fsdp", "model")
    assert flatten(adam.mu)[name].sharding == flatten(adam.nu)[name].sharding == wanted


def test_the_configs_placement_goes_first():
    rules = sharding.placement_rules([(r".*/token_embedding/embedding", (None, "model"))])
    placed = Placed("vop", (4, 1, 2), rules).frozen
    leaf = flatten(placed)["clip/text/token_embedding/embedding"]
    assert leaf.sharding.spec == jax.P(None, "model")


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([(".*", ("data", "rows"))], "'data' in .*axes are fsdp, model, or None"),
        ([(".*", ("fsdp", None, "fsdp"))], "an axis can shard one dimension only"),
        ([(".*", ("fsdp", "rows"))], "'rows' in .*axes are fsdp, model, or None"),
        ([("(", ("data",))], r"is not \(pattern, axes\)"),
        (["clip"], r"'clip' is not \(pattern, axes\)"),
    ],
)
def test_a_placement_that_cannot_be(placement, message):
    with pytest.raises(UserError, match=message):
        sharding.placement_rules(placement)


def test_a_placement_that_matches_nothing():
    rules = sharding.placement_rules([("clip/nothing", ("fsdp",))])
    with pytest.raises(UserError, match=r"'clip/nothing' matches no parameter; .* like clip/a"):
        sharding.check_rules(rules, ["clip/a"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((-1, 3, 1), "mesh.model=1: 3 does not divide the number of devices, 8; 1, 2, 4, 8"),
        ((4, 2, 2), "mesh.data=4, mesh.fsdp=2, mesh.model=2: takes 16 devices; available: 8"),
    ],
)
def test_a_mesh_that_cannot_be(shape, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(*shape)


def test_heads_that_the_mesh_does_not_divide():
    mesh = sharding.make_mesh(1, 1, 8)
    sharding.check_heads(mesh, {"visual": 16, "text": 8})
    message = "mesh.model=8: does not divide the 12 attention heads of the visual tower; 1, 2, 4 w"
    with pytest.raises(UserError, match=message):
        sharding.check_heads(mesh, {"visual": 12, "text": 8})
