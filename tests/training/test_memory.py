"""What saves memory changes nothing else: losses, gradients and a step, on one device and eight."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.collectives import collectives
from tests import tiny
from vop_jax.clip.remat import Remat
from vop_jax.clip.weights import cast_frozen
from vop_jax.storage.tensors import flatten
from vop_jax.training import sharding
from vop_jax.training.step import loss_and_gradient
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import merge, partition

BATCH = 16
CLIP = dataclasses.replace(tiny.CLIP, vision_layers=2, text_layers=1)
METHODS = ("vop", "vop_c", "vop_f", "adapter_attn", "full")
OPTIONS: dict[str, dict[str, Any]] = {
    "dots": {"remat": "dots"},
    "remat": {"remat": "full"},
    "chunks": {"frame_chunk": 4},
    "microbatches": {"microbatches": 2},
    "blocks": {"kernel": "blocks"},
    "all": {"remat": "full", "frame_chunk": 1, "microbatches": 2, "kernel": "blocks"},
}
CASES = [
    # Compiling takes seconds each; the case that has most in it stands for all. Here prompts are
    # shared by frames of one position, and then all frames are one sequence.
    ("vop_f+p", "all", 2),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(METHODS, OPTIONS, (1, 8))
    ),
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method's model and data on some devices, with options that save memory."""

    method: str
    devices: int = 1
    remat: Any = "none"
    frame_chunk: int = 0
    microbatches: int = 1
    kernel: Any = "xla"

    @property
    def mesh(self):
        return sharding.make_mesh(self.devices)

    @functools.cached_property
    def plain(self):
        """(model, params) without the options."""
        method = MethodConfig(self.method, visual_prompts=2, specific_prompts=1, frames=tiny.FRAMES)
        return tiny.model_and_params(method, clip=CLIP)

    @property
    def model(self):
        return self.plain[0].clone(kernel=self.kernel, remat=Remat(self.remat, self.frame_chunk))

    @property
    def arguments(self):
        """(trainable, frozen, batch)."""
        model, params = self.plain
        slots = model.method.text_slots(CLIP)
        trees = partition(params, model.method.trainable_patterns(CLIP))
        batch = {"frames": tiny.frames(BATCH), "ids": tiny.captions(BATCH, slots)}
        return *sharding.place(self.mesh, trees), sharding.to_global(self.mesh, batch)

    @functools.cached_property
    def program(self):
        options: dict[str, Any] = {"mesh": self.mesh, "microbatches": self.microbatches}
        gradient = functools.partial(loss_and_gradient, self.model, **options)
        return jax.jit(gradient).lower(*self.arguments).compile()


@functools.cache
def plain(method):
    """(loss and gradient, bytes of activations) without the options."""
    setting = Setting(method)
    values = jax.tree.map(np.asarray, setting.program(*setting.arguments))
    return values, setting.program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("method", "options", "devices"), CASES)
def test_loss_and_gradient_are_the_same(method, options, devices):
    setting = Setting(method, devices, **OPTIONS[options])
    loss, gradient = setting.program(*setting.arguments)
    (expected, right), activations = plain(method)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    right, gradient = flatten(right), flatten(gradient)
    assert right.keys() == gradient.keys()
    assert max(abs(leaf).max() for leaf in right.values()) > 1e-3  # there is something to get wrong
    for name, leaf in right.items():
        np.testing.assert_allclose(gradient[name], leaf, atol=1e-5, err_msg=name)
    # By the account of the CPU's compiler, which is of no use for `remat` without chunks: it
    # schedules what is computed again as early as it can.
    if devices == 2:
        held = setting.program.memory_analysis().temp_size_in_bytes
        assert held * devices < 0.45 * activations


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rows_stay_where_they_are(method):
    """The options add no collectives, loops counted by their turns."""

    def sent(setting):
        listed = collectives(setting.program.as_text())
        return sum(c.sent for c in listed), {c.kind for c in listed}

    everything, kinds = sent(Setting(method, 8, **OPTIONS["all"]))
    nothing, plain_kinds = sent(Setting(method, 8))
    assert kinds == plain_kinds and everything <= 1.02 * nothing


def test_chunks_are_equal_and_at_most_as_large_as_configured():
    for limit, chunks in ((0, 1), (12, 1), (99, 1), (6, 2), (5, 3), (1, 12)):
        assert Remat(frame_chunk=limit).chunk_count(12) == chunks


def test_frozen_parameters_in_the_compute_dtype_give_the_same_bits():
    setting = Setting("vop")
    trainable, frozen, batch = setting.arguments
    model = setting.model.clone(dtype=jnp.bfloat16)

    @jax.jit
    def features(frozen):
        params = merge(trainable, frozen)
        return model.apply({"params": params}, batch["frames"], batch["ids"])

    cast = cast_frozen(frozen, "bfloat16")
    for a, b in zip(features(frozen), features(cast), strict=True):
        np.testing.assert_array_equal(a, b)
    # Only what is cast at its use anyway is held in that dtype.
    exact = {k: v for k, v in flatten(cast).items() if v.dtype == jnp.float32}
    names = {name.split("/")[-2].split(".")[0] for name in exact}
    assert names == {"ln_1", "ln_2", "ln_pre", "ln_post", "ln_final", "clip"}  # clip/logit_scale
    for name, leaf in exact.items():
        np.testing.assert_array_equal(leaf, flatten(frozen)[name])
    same = cast_frozen(frozen, "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(same)} == {np.dtype("float32")}
