"""The step compiled ahead: once for each shape of a batch, and only where it fits."""

from datetime import timedelta

import jax
import numpy as np
import pytest
from absl import logging

from tests import tiny
from vop_jax.config.base import base_config
from vop_jax.errors import UserError
from vop_jax.training import compile, sharding
from vop_jax.training.compile import CompiledStep, MemoryEstimate, matmul_flops
from vop_jax.training.step import TrainState, make_optimizer, make_train_step
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import partition

METHOD = MethodConfig("vop", frames=tiny.FRAMES, visual_prompts=2)
GB = 10**9


class Compilations:
    """How many programs were compiled, or taken from a cache, since it was made."""

    def __init__(self):
        self.count, self.on = 0, True
        jax.monitoring.register_event_duration_secs_listener(self.heard)

    def heard(self, event, *_, **__):
        self.count += self.on and event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    heard = Compilations()
    yield heard
    heard.on = False  # jax keeps its listeners


def placed(shape):
    """(mesh, step, state, frozen) on a mesh of eight devices."""
    mesh = sharding.make_mesh(*shape)
    model, params = tiny.model_and_params(METHOD)
    trainable, frozen = partition(params, METHOD.trainable_patterns(tiny.CLIP))
    optimizer = make_optimizer(base_config().train)
    state = sharding.place(mesh, TrainState.create(trainable, optimizer))
    step = make_train_step(model, optimizer, mesh)
    return mesh, step, state, sharding.place(mesh, frozen)


def batch_of(mesh, size, seed=0):
    slots = METHOD.text_slots(tiny.CLIP)
    rows = {"frames": tiny.frames(size, seed), "ids": tiny.captions(size, slots, seed)}
    return sharding.to_global(mesh, rows)


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_once_for_each_shape_of_a_batch(shape, compilations):
    mesh, step, state, frozen = placed(shape)
    run = CompiledStep(step, mesh)
    batches = [batch_of(mesh, 8, seed) for seed in range(3)]
    larger = [batch_of(mesh, 16, seed) for seed in range(2)]
    places = jax.tree.map(lambda x: x.sharding, state)
    compilations.count = 0
    seen = []
    for batch in (*batches, *larger, batches[0]):
        state, metrics = run(state, frozen, batch)
        seen.append((len(run.programs), compilations.count))
    assert seen == [(1, 1)] * 3 + [(2, 2)] * 3
    assert int(state.step) == 6 and np.isfinite(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == places


def test_all_widths_of_captions_before_the_first_step(compilations, caplog):
    logging.set_verbosity(logging.INFO)
    mesh, step, state, frozen = placed((8, 1, 1))
    whole = batch_of(mesh, 8)
    slots = whole["ids"].shape[1]
    few = {**whole, "ids": whole["ids"][:, : slots - 2]}
    run = CompiledStep(step, mesh, (slots - 2, slots))
    with caplog.at_level("INFO", logger="absl"):
        state, _ = run(state, frozen, few)
    assert f"step for captions of {slots - 2} and {slots} slots compiled in" in caplog.text
    assert len(run.programs) == 2
    compilations.count = 0
    for batch in (whole, few):
        state, _ = run(state, frozen, batch)
    assert compilations.count == 0 and int(state.step) == 3


def test_what_it_takes_is_said(caplog, monkeypatch):
    logging.set_verbosity(logging.INFO)
    mesh, step, state, frozen = placed((1, 1, 1))
    size = sum(x.nbytes for x in jax.tree.leaves((state, frozen)))
    monkeypatch.setattr(compile, "available_memory", lambda: 1000)  # bytes
    monkeypatch.setattr(compile, "matmul_flops_per_second", lambda dtype, platform: 1e6)
    flops = matmul_flops(jax.make_jaxpr(step)(state, frozen, batch_of(mesh, 8)).jaxpr)
    run = CompiledStep(step, mesh, steps=100)
    with caplog.at_level("INFO", logger="absl"):
        run(state, frozen, batch_of(mesh, 8))
    (line,) = [m for m in caplog.messages if m.startswith("step compiled in")]
    (warning,) = [m for m in caplog.messages if "this machine has 0.000 free" in m]
    assert warning.startswith("a step takes 0.0") and "config.compute.remat" in warning
    (time,) = [m for m in caplog.messages if m.startswith("100 steps take ")]
    assert f"take {timedelta(seconds=round(flops / 1e4))} or more: {flops / 1e9:.3g} GFLOP" in time
    assert "GB of a device" in line and "activations" in line
    (program,) = run.programs.values()
    estimate = MemoryEstimate.of(program)
    assert estimate is not None and estimate.limit is None
    assert size < estimate.arguments < 1.5 * size + 1e5  # besides: the batch and metrics
    assert estimate.activations > 0 and str(estimate) in line


class Device:
    """One that says what it has."""

    def __init__(self, **stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats or None


class Program:
    """One whose compiler says what it takes."""

    def memory_analysis(self):
        sizes = {"argument": 3 * GB, "output": 2 * GB, "alias": 1 * GB, "temp": 10 * GB}
        names = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
        return type("Memory", (), names)


def test_a_step_that_does_not_fit():
    estimate = MemoryEstimate.of(Program(), Device(bytes_limit=16 * GB, bytes_in_use=6 * GB))
    assert estimate == MemoryEstimate(
        arguments=4 * GB, activations=10 * GB, other=3 * GB, limit=16 * GB
    )
    message = (
        "a step needs 17.0 GB of a device: 4.0 parameters, state and batch, 10.0 activations, 3.0 "
        "other arrays; it has 16.0, 1.0 GB are missing: set config.compute.remat='full', "
    )
    with pytest.raises(UserError) as caught:
        estimate.check()
    assert str(caught.value).startswith(message)
    for key in ("frame_chunk", "train.microbatches", "compute.dtype", "mesh.fsdp", "memory.md"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "device", [None, Device(), Device(bytes_in_use=GB), Device(bytes_limit=14 * GB)]
)
def test_a_step_that_fits_or_a_device_that_does_not_say(device):
    estimate = MemoryEstimate.of(Program(), device)
    assert estimate is not None and estimate.total == 14 * GB and estimate.other == 0
    estimate.check()


def test_it_is_refused_before_it_runs(monkeypatch):
    mesh, step, state, frozen = placed((1, 1, 1))
    too_much = MemoryEstimate(arguments=GB, activations=GB, limit=GB)
    monkeypatch.setattr(compile.MemoryEstimate, "of", lambda *_: too_much)
    with pytest.raises(UserError, match=r"1\.0 GB are missing"):
        CompiledStep(step, mesh)(state, frozen, batch_of(mesh, 8))
    assert int(state.step) == 0  # not consumed


def test_a_compiler_that_refuses_is_translated_and_others_are_not():
    def refused_with(message):
        def step(state, frozen, batch):
            raise jax.errors.JaxRuntimeError(message)

        mesh, _, state, frozen = placed((1, 1, 1))
        CompiledStep(step, mesh)(state, frozen, batch_of(mesh, 8))

    with pytest.raises(UserError, match=r"does not fit a device .*Used 20G of 16G.*remat='full'"):
        refused_with("RESOURCE_EXHAUSTED: Ran out of memory.\nUsed 20G of 16G hbm.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refused_with("INTERNAL: something else")
