"""The loop: exact resume, frozen bits, signals, divergence, devices, waiting for data."""

import os
import signal
import threading

import jax
import numpy as np
import pytest
from absl import logging
from etils import epath

from tests.training import rows
from vop_jax import cli
from vop_jax.storage.tensors import flatten
from vop_jax.training import loop, prefetch
from vop_jax.training.checkpoint import Checkpoints
from vop_jax.training.profile import trace_steps
from vop_jax.training.writer import MetricWriter, read_metrics
from vop_jax.tuning.partition import parameter_count

STEPS = 6


class Run:
    """A run in a workdir, continued from its checkpoints."""

    def __init__(self, workdir, devices=1):
        self.workdir = str(workdir)
        self.mesh, self.config, make_step, state, self.frozen = rows.prepare(devices, steps=STEPS)
        self.step = jax.jit(make_step(1))
        self.checkpoints = Checkpoints(self.workdir, keep=2)
        self.state, self.meta = self.checkpoints.restore(state) or (state, {})

    def fit(self, source=rows.batches):
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
                    evaluate=lambda state, step: None,
                )
        finally:
            self.checkpoints.close()


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_equal(a, b, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, run, final state) of a run on one device that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    run = Run(workdir)
    return workdir, run, run.fit()


class Killed(Exception):
    pass


def killed_at(step):
    """Batches that end as kill -9 would: nothing after them runs."""

    def source(start):
        yield from (rows.batch(k) for k in range(start, step))
        raise Killed

    return source


def test_a_run_that_is_killed_and_signalled_ends_with_the_same_bits(whole, tmp_path):
    for death in (1, 3):
        with pytest.raises(Killed):
            Run(tmp_path).fit(killed_at(death))
    run = Run(tmp_path)
    assert int(run.state.step) == 2 and run.meta == {"note": "x"}
    step = run.step

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    run.step = signalled
    with pytest.raises(cli.Interrupted) as caught, cli.raise_on_signals():
        run.fit()
    assert caught.value.exit_status == 143
    assert saved_steps(tmp_path)[-1] == 3  # the step under way is saved
    assert_equal(whole[2].trainable, Run(tmp_path).fit().trainable)
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_one_and_eight_devices_learn_the_same(whole, tmp_path):
    """With CLIP in place of the two products: see test_meshes."""
    workdir, _, state = whole
    assert_equal(Run(tmp_path, devices=8).fit().trainable, state.trainable, atol=1e-6)
    losses = [[line["loss"] for line in read_metrics(d)] for d in (workdir, tmp_path)]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_frozen_parameters_stay_and_the_rest_learns_in_one_program(whole):
    workdir, run, state = whole
    start, after = flatten(rows.params()), flatten(state.trainable)
    assert after.keys() == {"clip/logit_scale", "prompts/text", "prompts/video"}
    assert all((after[name] != start[name]).all() for name in after)
    frozen = flatten(run.frozen)
    assert frozen.keys() == start.keys() - after.keys()
    assert_equal(frozen, {name: start[name] for name in frozen})
    # Optimizer moments exist for the trainable tree alone, and nothing else is saved.
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert moments <= 2 * parameter_count(state.trainable) + 2
    assert saved_steps(workdir) == [4, 6]
    metadata = (workdir / "checkpoints/6/state/_METADATA").read_text()
    assert "prompts" in metadata and "logit_scale" in metadata
    assert "'clip', 'video'" not in metadata
    assert run.step._cache_size() == 1  # no recompilation after the first step


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run = Run(tmp_path)
    step = run.step

    def poisoned(*arguments):
        state, metrics = step(*arguments)
        return state, metrics | {"loss": metrics["loss"] / (int(state.step) != 5)}

    run.step = poisoned
    with pytest.raises(loop.NonFiniteLoss, match="loss is inf at step 5"):
        run.fit()
    assert saved_steps(tmp_path)[-1] == 4


def test_a_trace_holds_the_steps_that_were_chosen(tmp_path):
    def traced(first, steps, source=rows.batches):
        run = Run(tmp_path)
        with trace_steps(run.step, first, steps, epath.Path(tmp_path)) as run.step:
            run.fit(source)

    with pytest.raises(Killed):
        traced(1, (2, 9), killed_at(3))
    assert not (tmp_path / "profile").exists()
    traced(3, (2, 4))  # its checkpoint is that of step 2
    (file,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert {dict(e.stats)["step_num"] for e in events if e.name == "train"} == {3, 4}
    traced(7, (1, 2))
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")) == [file]


def test_the_time_that_devices_wait_for_batches_is_logged(tmp_path, monkeypatch, caplog):
    logging.set_verbosity(logging.INFO)
    caplog.set_level("INFO", logger="absl")
    outputs, noted = [], []

    class Noted(prefetch.IdleTimer):
        def next(self, batches):
            return super().next(batches)[0], lambda: 1.5  # seconds, of every batch

        def step_started(self, output):
            noted.append(output)
            super().step_started(output)

    monkeypatch.setattr(prefetch, "IdleTimer", Noted)
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
        assert line["data_wait"] / line["videos_per_second"] == pytest.approx(1.5 / rows.BATCH)
    line = next(m for m in caplog.messages if m.startswith(f"step {STEPS}/{STEPS}"))
    assert "videos/s" in line and "waiting for data" in line


def test_a_few_steps_are_queued_on_the_devices_and_no_more(tmp_path):
    waits, main_thread, started = [], threading.current_thread(), 0

    class Output(float):
        def block_until_ready(self):
            if threading.current_thread() is main_thread:
                waits.append((self, started))

    run = Run(tmp_path)
    run.config.log_every = run.config.checkpoint_every = 100
    step = run.step

    def counted(*arguments):
        nonlocal started
        started += 1
        return step(*arguments)[0], {"loss": Output(started)}

    run.step = counted
    run.fit()
    pending = loop.MAX_PENDING_STEPS
    assert waits == [(2, pending + 1), (3, pending + 2)]  # the first step is over when it is logged
