"""The loop on random data: exact resume, frozen bits, signals, divergence, devices, waiting."""

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
from vop_jax.data import tokenizer
from vop_jax.storage.tensors import flatten
from vop_jax.training import loop, prefetch, sharding
from vop_jax.training.checkpoint import Checkpoints
from vop_jax.training.step import TrainState, make_optimizer, make_train_step
from vop_jax.training.writer import MetricWriter, read_metrics
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import parameter_count, partition

METHOD = MethodConfig(visual_prompts=2, text_prefix=1, text_suffix=2)
BATCH = 8


def batches(start: int):
    slots = METHOD.text_slots(tiny.CLIP)
    for k in itertools.count(start):
        yield {"frames": tiny.frames(BATCH, seed=k), "ids": tiny.captions(BATCH, slots, seed=k)}


def train_config(steps=6):
    config = base_config().train
    with config.unlocked():
        config.update(steps=steps, batch_size=BATCH, log_every=2, checkpoint_every=2)
    return config


class Run:
    """A run in a workdir, taken up where its checkpoints are."""

    def __init__(self, workdir, method=METHOD, devices=1, steps=6):
        self.model, params = tiny.model_and_params(method)
        params["clip"]["logit_scale"] = np.float32(4.6052)  # as OpenAI's
        self.mesh = sharding.make_mesh(devices)
        self.config = train_config(steps)
        patterns = (*method.trainable_patterns(tiny.CLIP), "clip/logit_scale")
        trainable, frozen = partition(params, patterns)
        self.frozen = sharding.place(self.mesh, frozen)
        optimizer = make_optimizer(self.config)
        state = TrainState.create(sharding.place(self.mesh, trainable), optimizer)
        self.state = jax.device_put(state, sharding.replicated(self.mesh))
        self.step = jax.jit(make_train_step(self.model, optimizer, self.mesh), donate_argnums=0)
        self.workdir = str(workdir)
        self.checkpoints = Checkpoints(self.workdir, keep=2)
        self.state, self.meta = self.checkpoints.restore(self.state) or (self.state, {})

    def fit(self, source=batches, evaluate=lambda state, step: None):
        start = int(self.state.step)
        try:
            with MetricWriter(self.workdir, start) as writer:
                return loop.fit(
                    self.step,
                    self.state,
                    self.frozen,
                    source(start),
                    mesh=self.mesh,
                    config=self.config,
                    checkpoints=self.checkpoints,
                    meta={"note": "x"},
                    writer=writer,
                    evaluate=evaluate,
                )
        finally:
            self.checkpoints.close()


def assert_same(a, b, **tolerance):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


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


def test_resume_is_bit_identical(tmp_path):
    whole = Run(tmp_path / "whole").fit()
    for death in (1, 3, 5):
        with pytest.raises(Killed):
            Run(tmp_path / "cut").fit(killed_at(death))
    resumed = Run(tmp_path / "cut")
    assert int(resumed.state.step) == 4
    state = resumed.fit()
    assert_same(whole.trainable, state.trainable)
    scale = np.asarray(whole.trainable["clip"]["logit_scale"])
    assert scale.dtype == np.float32 and 0 < scale < np.log(100) - 1e-3  # the temperature learns
    steps = [line["step"] for line in read_metrics(tmp_path / "cut")]
    assert steps == sorted(set(steps)) and steps[-1] == 6


@pytest.mark.parametrize(
    "name", ["vop", "proj", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bias", "partial"))]
)
def test_frozen_parameters_are_untouched_and_the_rest_learns(tmp_path, name):
    run = Run(tmp_path, MethodConfig(name, visual_prompts=2, text_prefix=1, text_suffix=2))
    slots = run.model.method.text_slots(tiny.CLIP)

    def source(start):
        for k in itertools.count(start):
            yield {"frames": tiny.frames(BATCH, k), "ids": tiny.captions(BATCH, slots, k)}

    before = jax.tree.map(np.array, run.frozen)
    started = jax.tree.map(np.array, run.state.trainable)
    state = run.fit(source)
    assert_same(before, run.frozen)
    # A key's bias shifts all logits of a query alike: softmax does not see it.
    still = [
        name
        for name, leaf in flatten(state.trainable).items()
        if np.array_equal(leaf, flatten(started)[name]) and not name.endswith("attn/key/bias")
    ]
    assert not still
    # Optimizer moments exist for the trainable tree alone.
    size = parameter_count(state.trainable)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments <= 2 * size


def test_one_and_eight_devices_learn_the_same(tmp_path):
    one = Run(tmp_path / "one").fit()
    eight = Run(tmp_path / "eight", devices=8).fit()
    assert_same(one.trainable, eight.trainable, atol=1e-5, rtol=0)
    losses = [[line["loss"] for line in read_metrics(tmp_path / d)] for d in ("one", "eight")]
    np.testing.assert_allclose(*losses, atol=1e-5)


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


def test_sigterm_saves_the_step_under_way(tmp_path):
    run = Run(tmp_path)
    step = run.step

    def signalled(state, frozen, batch):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, frozen, batch)

    run.step = signalled
    with pytest.raises(cli.Interrupted) as caught, cli.raised():
        run.fit()
    assert caught.value.exit_status == 143
    assert Checkpoints(str(tmp_path), keep=2).latest_step() == 3
    assert_same(Run(tmp_path).fit().trainable, Run(tmp_path / "whole").fit().trainable)


def test_checkpoints_hold_the_trainable_tree_only_and_are_pruned(tmp_path):
    Run(tmp_path).fit()
    assert Run(tmp_path).meta == {"note": "x"}
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6]
    on_disk = {p.name for p in (tmp_path / "checkpoints" / "6" / "state").rglob("*")}
    assert not any("clip" in name for name in on_disk)
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoints" / "6").rglob("*"))
    assert size < 100_000  # prompts and two moments: 312 floats each


def test_no_recompilation_after_the_first_step(tmp_path, caplog):
    run = Run(tmp_path)
    run.fit()
    assert run.step._cache_size() == 1


def test_captions_in_buckets_teach_the_same_with_a_program_for_each_width(tmp_path):
    widths = []

    def source(start):
        slots = METHOD.text_slots(tiny.CLIP)
        for k, batch in zip(itertools.count(start), batches(start), strict=False):
            ids = tiny.captions(BATCH, (6, 12, slots)[k % 3], seed=k)
            ids = np.pad(ids, ((0, 0), (0, slots - ids.shape[1])))
            yield batch | {"ids": tokenizer.fit_bucket(ids, widths)}

    whole = Run(tmp_path / "whole").fit(source)
    widths[:] = 6, 12
    run = Run(tmp_path / "cut")
    assert_same(whole.trainable, run.fit(source).trainable, atol=1e-5, rtol=0)
    assert run.step._cache_size() == 3
    losses = [[line["loss"] for line in read_metrics(tmp_path / d)] for d in ("whole", "cut")]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_progress_is_logged(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        Run(tmp_path).fit()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step 6/6")]
    assert lines and "videos/s" in lines[0] and "waiting for data" in lines[0]


def test_how_long_devices_stood_still_is_told_as_waiting_for_data(tmp_path, monkeypatch):
    made, given = [], []

    class Noted(prefetch.Idle):
        def next(self, batches):
            return super().next(batches)[0], lambda: 1.5  # seconds, of every batch

        def ran(self, output):
            given.append(output)
            super().ran(output)

    monkeypatch.setattr(prefetch, "Idle", Noted)
    run = Run(tmp_path, steps=4)
    step = run.step

    def kept(*rows):
        made.append(step(*rows))
        return made[-1]

    run.step = kept
    run.fit()
    assert len(made) == 4 and all(a is metrics for a, (_, metrics) in zip(given, made, strict=True))
    compiling, *lines = read_metrics(tmp_path)
    assert "data_wait" not in compiling and [line["step"] for line in lines] == [2, 4]
    for line in lines:  # both are by the same time
        assert line["data_wait"] / line["videos_per_second"] == pytest.approx(1.5 / BATCH)


def test_a_few_steps_are_started_ahead_of_the_devices_and_no_more(tmp_path):
    waited, main = [], threading.current_thread()

    class Output(float):
        def block_until_ready(self):
            if threading.current_thread() is main:
                waited.append((self, started))

    run = Run(tmp_path, steps=loop.MAX_PENDING_STEPS + 2)
    run.config.log_every = run.config.checkpoint_every = 100
    step, started = run.step, 0

    def counted(*given):
        nonlocal started
        started += 1
        return step(*given)[0], {"loss": Output(started)}

    run.step = counted
    run.fit()
    # The first is logged, and with that over.
    assert waited == [(2, loop.MAX_PENDING_STEPS + 1), (3, loop.MAX_PENDING_STEPS + 2)]
