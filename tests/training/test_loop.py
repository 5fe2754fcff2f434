"""The loop on random data: exact resume, frozen bits, signals, divergence, devices, waiting."""

import functools
import itertools
import os
import signal
import threading

import jax
import numpy as np
import pytest
from absl import logging

from tests import tiny
from vop_jax import cli
from vop_jax.config.base import base_config
from vop_jax.storage.tensors import flatten
from vop_jax.training import loop, prefetch, sharding
from vop_jax.training.checkpoint import Checkpoints
from vop_jax.training.step import TrainState, make_optimizer, make_train_step
from vop_jax.training.writer import MetricWriter, read_metrics
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import parameter_count, partition

BATCH, STEPS = 8, 6


def method_of(name):
    return MethodConfig(name, visual_prompts=2, text_prefix=1, text_suffix=2)


def batches(start, name="vop"):
    slots = method_of(name).text_slots(tiny.CLIP)
    for k in itertools.count(start):
        yield {"frames": tiny.frames(BATCH, seed=k), "ids": tiny.captions(BATCH, slots, seed=k)}


@functools.cache
def compiled(name, devices, steps):
    """(mesh, config, optimizer, jitted step), shared by all runs of a kind."""
    mesh, config = sharding.make_mesh(devices), base_config().train
    config.update(steps=steps, batch_size=BATCH, log_every=2, checkpoint_every=2)
    optimizer = make_optimizer(config)
    model, _ = tiny.model_and_params(method_of(name))
    return mesh, config, optimizer, jax.jit(make_train_step(model, optimizer, mesh))


class Run:
    """A run in a workdir, continued from its checkpoints."""

    def __init__(self, workdir, name="vop", devices=1, steps=STEPS):
        self.name, self.workdir = name, str(workdir)
        self.mesh, self.config, optimizer, self.step = compiled(name, devices, steps)
        method, (_, params) = method_of(name), tiny.model_and_params(method_of(name))
        params["clip"]["logit_scale"] = np.float32(4.6052)  # as OpenAI's
        patterns = (*method.trainable_patterns(tiny.CLIP), "clip/logit_scale")
        self.trainable, frozen = partition(params, patterns)
        self.frozen = sharding.place(self.mesh, frozen)
        state = TrainState.create(sharding.place(self.mesh, self.trainable), optimizer)
        self.state = jax.device_put(state, sharding.replicated(self.mesh))
        self.checkpoints = Checkpoints(self.workdir, keep=2)
        self.state, self.meta = self.checkpoints.restore(self.state) or (self.state, {})

    def fit(self, source=batches):
        start = int(self.state.step)
        rows = source(start) if source is not batches else batches(start, self.name)
        try:
            with MetricWriter(self.workdir, start) as writer:
                return loop.fit(
                    self.step,
                    self.state,
                    self.frozen,
                    rows,
                    mesh=self.mesh,
                    config=self.config,
                    checkpoints=self.checkpoints,
                    meta={"note": "x"},
                    writer=writer,
                    evaluate=lambda state, step: None,
                )
        finally:
            self.checkpoints.close()


def assert_equal(a, b, **tolerance):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(
            a[name], b[name], err_msg=name, **tolerance or {"rtol": 0, "atol": 0}
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, final state) of a run on one device that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, Run(workdir).fit()


class Killed(Exception):
    pass


def killed_at(step):
    """Batches that end as kill -9 would: nothing after them runs."""

    def source(start):
        for k, batch in zip(itertools.count(start), batches(start), strict=False):
            if k == step:
                raise Killed
            yield batch

    return source


def test_a_run_that_is_killed_and_signalled_ends_with_the_same_bits(whole, tmp_path):
    for death in (1, 3):
        with pytest.raises(Killed):
            Run(tmp_path).fit(killed_at(death))
    run = Run(tmp_path)
    assert int(run.state.step) == 2 and run.meta == {"note": "x"}
    step = run.step

    def signalled(state, frozen, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(state, frozen, batch)

    run.step = signalled
    with pytest.raises(cli.Interrupted) as caught, cli.raised():
        run.fit()
    assert caught.value.exit_status == 143
    assert Checkpoints(str(tmp_path), keep=2).latest_step() == 3  # the step under way is saved
    assert_equal(whole[1].trainable, Run(tmp_path).fit().trainable)
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_one_and_eight_devices_learn_the_same(whole, tmp_path):
    workdir, state = whole
    assert_equal(Run(tmp_path, devices=8).fit().trainable, state.trainable, atol=1e-5, rtol=0)
    losses = [[line["loss"] for line in read_metrics(d)] for d in (workdir, tmp_path)]
    np.testing.assert_allclose(*losses, atol=1e-5)
    scale = np.asarray(state.trainable["clip"]["logit_scale"])
    assert scale.dtype == np.float32 and 0 < scale < np.log(100) - 1e-3  # the temperature learns


@pytest.mark.parametrize(
    "name", ["proj", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bias", "partial"))]
)
def test_frozen_parameters_stay_and_the_rest_learns_in_one_program(tmp_path, name, caplog):
    logging.set_verbosity(logging.INFO)
    run = Run(tmp_path, name)
    before = jax.tree.map(np.array, run.frozen)
    with caplog.at_level("INFO", logger="absl"):
        state = run.fit()
    assert_equal(before, run.frozen)
    # The bias of a key shifts all logits of a query alike: softmax ignores it.
    still = [
        name
        for name, leaf in flatten(run.trainable).items()
        if np.array_equal(leaf, flatten(state.trainable)[name]) and "attn/key/bias" not in name
    ]
    assert not still
    # Optimizer moments exist for the trainable tree alone.
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments <= 2 * parameter_count(state.trainable)
    assert run.step._cache_size() == 1  # no recompilation after the first step
    line = next(m for m in caplog.messages if m.startswith(f"step {STEPS}/{STEPS}"))
    assert "videos/s" in line and "waiting for data" in line


def test_checkpoints_hold_the_trainable_tree_only_and_are_pruned(whole):
    folder = whole[0] / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [4, 6]
    names = {path.name for path in (folder / "6" / "state").rglob("*")}
    assert not any("visual.transformer" in name for name in names)
    size = sum(path.stat().st_size for path in (folder / "6").rglob("*"))
    assert size < 100_000  # prompts and two moments: 312 floats each


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    run = Run(tmp_path)
    step = run.step

    def poisoned(state, frozen, batch):
        state, metrics = step(state, frozen, batch)
        return state, metrics | {"loss": metrics["loss"] / (int(state.step) != 5)}

    run.step = poisoned
    with pytest.raises(loop.NonFiniteLoss, match="loss is inf at step 5"):
        run.fit()
    assert Checkpoints(str(tmp_path), keep=2).latest_step() == 4


def test_the_time_that_devices_wait_for_batches_is_logged(tmp_path, monkeypatch):
    outputs, noted = [], []

    class Noted(prefetch.Idle):
        def next(self, batches):
            return super().next(batches)[0], lambda: 1.5  # seconds, of every batch

        def ran(self, output):
            noted.append(output)
            super().ran(output)

    monkeypatch.setattr(prefetch, "Idle", Noted)
    run = Run(tmp_path)
    step = run.step

    def recorded(*arguments):
        outputs.append(step(*arguments))
        return outputs[-1]

    run.step = recorded
    run.fit()
    assert len(outputs) == STEPS
    assert all(a is metrics for a, (_, metrics) in zip(noted, outputs, strict=True))
    compiling, *lines = read_metrics(tmp_path)
    assert "data_wait" not in compiling and [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:  # both are divided by the same time
        assert line["data_wait"] / line["videos_per_second"] == pytest.approx(1.5 / BATCH)


def test_a_few_steps_are_queued_on_the_devices_and_no_more(tmp_path, monkeypatch):
    waits, main_thread, started = [], threading.current_thread(), 0

    class Output(float):
        def block_until_ready(self):
            if threading.current_thread() is main_thread:
                waits.append((self, started))

    run = Run(tmp_path)
    monkeypatch.setitem(run.config, "log_every", 100)
    monkeypatch.setitem(run.config, "checkpoint_every", 100)
    step = run.step

    def counted(*arguments):
        nonlocal started
        started += 1
        return step(*arguments)[0], {"loss": Output(started)}

    run.step = counted
    run.fit()
    pending = loop.MAX_PENDING_STEPS
    assert waits == [(2, pending + 1), (3, pending + 2)]  # the first step is over when it is logged
