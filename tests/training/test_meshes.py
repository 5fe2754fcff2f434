"""Training gives the same losses and parameters on every mesh, with and without kernels."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from benchmarks.collectives import collectives
from tests import tiny
from tests.clip.kernels import kernels
from vop_jax.config.base import base_config
from vop_jax.evaluation.evaluate import make_encoders
from vop_jax.storage.tensors import flatten
from vop_jax.training import sharding
from vop_jax.training.compile import CompiledStep
from vop_jax.training.step import TrainState, loss_and_gradient, make_optimizer, make_train_step
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import merge, partition

# (data, fsdp, model); compiling for eight devices takes its time, so one case is quick.
MESHES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]
QUICK = [("vop_f+c", (2, 2, 2))]
CASES = [
    pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow)
    for name in ("vop", "vop_f+c", "full")
    for mesh in MESHES
]
BATCH = 8
CLIP = dataclasses.replace(tiny.CLIP, vision_layers=2, text_layers=1)
OPENAI_SCALE = np.float32(4.6052)  # as in their ViT-B/32: ln 100


class Trained:
    """A method after some steps on a mesh."""

    def __init__(self, name, shape, embed):
        method = MethodConfig(name, frames=tiny.FRAMES, visual_prompts=2, specific_prompts=1)
        clip, steps = (tiny.CLIP, 3) if name == "full" else (CLIP, 2)
        mesh, (model, params) = sharding.make_mesh(*shape), tiny.model_and_params(method, clip=clip)
        if name == "full":
            params["clip"]["logit_scale"] = OPENAI_SCALE
        config = base_config().train
        config.update(steps=steps, warmup=0.0)
        optimizer = make_optimizer(config)
        trainable, frozen = partition(params, method.trainable_patterns(clip))
        frozen = sharding.place(mesh, frozen)
        state = sharding.place(mesh, TrainState.create(trainable, optimizer))
        self.placement = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = CompiledStep(functools.partial(make_train_step, model, optimizer, mesh), mesh)
        self.losses, slots = [], method.text_slots(clip)
        for k in range(steps):
            rows = {"frames": tiny.frames(BATCH, k), "ids": tiny.captions(BATCH, slots, k)}
            batch = sharding.to_global(mesh, rows)
            state, metrics = step(state, frozen, batch)
            self.losses.append(float(metrics["loss"]))
        self.state, self.embeddings = state, []
        if embed:
            params, rows = merge(state.trainable, frozen), (batch["frames"], batch["ids"])
            for encode, x in zip(make_encoders(model, mesh), rows, strict=True):
                self.embeddings.append(np.asarray(encode(params, x)))


@functools.cache
def on_one_device(name, embed):
    return Trained(name, (1, 1, 1), embed)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_every_mesh_learns_the_same(name, shape):
    embed = (name, shape) not in QUICK
    one, many = on_one_device(name, embed), Trained(name, shape, embed)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5, atol=1e-5)
    for a, b in zip(many.embeddings, one.embeddings, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    learnt = flatten(sharding.to_host(many.state.trainable))
    if name == "full":
        scale = learnt["clip/logit_scale"]
        assert scale.dtype == np.float32 and 0 < scale < OPENAI_SCALE - 1e-4
    # AdamW divides a gradient by its size: where it is nearly zero, rounding moves the parameter.
    # Of the 54 thousand of `full` a few are, by up to a fiftieth of what they moved.
    atol = 5e-4 if name == "full" else 1e-5
    for leaf, expected in flatten(one.state.trainable).items():
        # A softmax ignores the bias of its keys: the gradient is rounding, AdamW takes its sign.
        if not leaf.endswith("attn/key/bias"):
            np.testing.assert_allclose(learnt[leaf], expected, atol=atol, err_msg=leaf)
    same_place = jax.tree.map(
        lambda x, to: x.sharding.is_equivalent_to(to, x.ndim), many.state, many.placement
    )
    assert all(jax.tree.leaves(same_place)), same_place


def with_kernel(name):
    """(model, the same with kernels, parameters) of a CLIP with heads that the kernels support."""
    method = MethodConfig(name, frames=tiny.FRAMES, visual_prompts=2, specific_prompts=1)
    clip = dataclasses.replace(CLIP, text_heads=1)  # of 16
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
    frames_of_a_device = tiny.FRAMES * BATCH // mesh.size
    assert packed and {shape[0] for shape in packed} == {frames_of_a_device}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vop", "vop_f+c"])
def test_kernels_run_on_every_device(monkeypatch, name):
    """Each reads its own rows: nothing is gathered for them, and what is learnt is the same."""
    plain, fused, params = with_kernel(name)
    clip, method, mesh = plain.clip_config, plain.method, sharding.make_mesh()
    batch = {"frames": tiny.frames(BATCH), "ids": tiny.captions(BATCH, method.text_slots(clip))}
    trees = partition(params, method.trainable_patterns(clip))
    expected = jax.jit(functools.partial(loss_and_gradient, plain))(*trees, batch)
    packed, backward = kernels.interpret(monkeypatch)
    step = jax.jit(functools.partial(loss_and_gradient, fused, mesh=mesh))
    arguments = *sharding.place(mesh, trees), sharding.to_global(mesh, batch)
    program = step.lower(*arguments).compile()
    # Of gradients up to ten, at a temperature of a hundred.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), program(*arguments), expected
    )
    frames_of_a_device = tiny.FRAMES * BATCH // mesh.size
    assert packed[0] == (frames_of_a_device, 5, 3, clip.vision_heads, 16) and "kernel" in backward
    assert sum(c.kind == "all-gather" for c in collectives(program.as_text())) == 1
