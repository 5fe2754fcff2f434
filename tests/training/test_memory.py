"""What saves memory changes nothing else: losses, gradients and a step, on one device and eight."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from tests import tiny
from vop_jax.clip.memory import Memory
from vop_jax.config import base_config
from vop_jax.tensorfile import flatten
from vop_jax.training import sharding
from vop_jax.training.optimizer import make_optimizer
from vop_jax.training.step import TrainState, loss_and_gradient, make_train_step
from vop_jax.tuning import partition
from vop_jax.tuning.methods import MethodConfig

BATCH = 16
METHODS = ("vop", "vop_c", "vop_f", "adapter_attn", "full")
KNOBS: dict[str, dict[str, Any]] = {
    "dots": {"remat": "dots"},
    "remat": {"remat": "full"},
    "chunks": {"frame_chunk": 2},
    "microbatches": {"microbatches": 2},
    "all": {"remat": "full", "frame_chunk": 1, "microbatches": 2, "kernel": "blocks"},
}
COLLECTIVES = r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def method_of(name):
    return MethodConfig(name, visual_prompts=2, specific_prompts=1, frames=tiny.FRAMES)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method's model and data on some devices, with knobs."""

    method: str
    devices: int = 1
    remat: Any = "none"
    frame_chunk: int = 0
    microbatches: int = 1
    kernel: Any = "xla"

    @property
    def model(self):
        memory = Memory(self.remat, self.frame_chunk)
        model, _ = tiny.model_and_params(method_of(self.method))
        return model.clone(long_kernel=self.kernel, memory=memory)

    @property
    def arguments(self):
        """(trainable, frozen, batch)."""
        model, params = tiny.model_and_params(method_of(self.method))
        slots, mesh = model.method.text_slots(tiny.CLIP), sharding.make_mesh(self.devices)
        split = partition.split(params, model.method.trainable_patterns(tiny.CLIP))
        batch = {"frames": tiny.frames(BATCH), "ids": tiny.captions(BATCH, slots)}
        placed = (sharding.place(mesh, tree) for tree in split)
        return *placed, sharding.to_global(mesh, batch)

    @functools.cached_property
    def program(self):
        gradient = functools.partial(
            loss_and_gradient,
            self.model,
            mesh=sharding.make_mesh(self.devices),
            microbatches=self.microbatches,
        )
        return jax.jit(gradient).lower(*self.arguments).compile()


@functools.cache
def plain(method):
    setting = Setting(method)
    return jax.tree.map(np.asarray, setting.program(*setting.arguments))


def assert_equal(method, found):
    (loss, gradient), (expected, right) = found, plain(method)
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    right, gradient = flatten(right), flatten(gradient)
    assert right.keys() == gradient.keys()
    for name, leaf in right.items():
        np.testing.assert_allclose(gradient[name], leaf, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("knob", KNOBS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_the_same(method, knob, devices):
    setting = Setting(method, devices, **KNOBS[knob])
    assert_equal(method, setting.program(*setting.arguments))
