"""The training loop: batches in, steps, and at their times metrics, evaluations and checkpoints."""

import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vop_jax import cli
from vop_jax.training import hosts, prefetch
from vop_jax.training.checkpoint import Checkpoints
from vop_jax.training.progress import Progress
from vop_jax.training.step import Batch, Metrics, TrainState, learning_rate
from vop_jax.training.writer import NoWriter

MAX_PENDING_STEPS = 4  # steps queued on the devices at a time, each with its batch in their memory

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the newest checkpoint is from before it."""


@dataclasses.dataclass
class MetricLog:
    """The metrics of the steps since the last logged line, fetched only when they are logged.

    Attributes:
        schedule: step -> learning rate.
        metrics: [(step, its metrics on the device)], so that the device can run ahead.
        waits: functions that return the seconds for which devices waited for a batch.
    """

    writer: NoWriter
    schedule: Callable[[int], Any]
    batch_size: int
    metrics: list[tuple[int, Metrics]] = dataclasses.field(default_factory=list)
    waits: list[Callable[[], float]] = dataclasses.field(default_factory=list)
    videos: int = 0
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, step: int, metrics: Metrics, wait: Callable[[], float]) -> int | None:
        """Adds a step; if many are queued on the devices, waits for an earlier one, returned."""
        self.metrics.append((step, metrics))
        self.waits.append(wait)
        self.videos += self.batch_size
        if len(self.metrics) < MAX_PENDING_STEPS:
            return None
        earlier, arrays = self.metrics[-MAX_PENDING_STEPS]
        jax.block_until_ready(arrays)
        return earlier

    def fetch(self) -> list[dict[str, float]]:
        """Waits for the metrics of these steps; raises NonFiniteLoss at the first bad one."""
        rows = [{k: float(v) for k, v in jax.device_get(m).items()} for _, m in self.metrics]
        for (step, _), row in zip(self.metrics, rows, strict=True):
            for key, number in row.items():
                if not np.isfinite(number):
                    raise NonFiniteLoss(f"{key} is {number} at step {step}")
        return rows

    def write(self, step: int, *, compiling: bool) -> str:
        """Writes the mean of the metrics and resets them; returns a note for the progress line."""
        rows = self.fetch()
        scalars = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        scalars["learning_rate"] = float(self.schedule(step - 1))
        note = f"loss {scalars['loss']:.4f}"
        if not compiling:  # the first step's time is the compiler's
            elapsed = time.perf_counter() - self.start
            speed, waiting = self.videos / elapsed, sum(wait() for wait in self.waits) / elapsed
            scalars |= {"videos_per_second": speed, "data_wait": waiting}
            note = f"{note}  {speed:.1f} videos/s  {waiting:.0%} waiting for data"
        self.writer.write_scalars(step, scalars)
        self.metrics.clear()
        self.reset_rates()
        return note

    def reset_rates(self) -> None:
        self.videos, self.waits, self.start = 0, [], time.perf_counter()


def fit(
    step_fn: Step,
    state: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    mesh: Mesh,
    config: ConfigDict,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    writer: NoWriter,
    evaluate: Callable[[TrainState, int], object],
) -> TrainState:
    """Trains from `state.step` to `config.steps`; saves and returns the last state.

    Args:
        step_fn: the jitted or compiled step; it may consume `state`.
        batches: this process's rows of batches `state.step`, `state.step + 1`, …
        config: the config's section `train`.
        meta: JSON saved with each checkpoint.
        evaluate: called with (state, step) every `eval_every` steps, not after the last.

    Raises:
        NonFiniteLoss: names the first step whose loss or gradient is not finite.
        Interrupted: a signal; the state after the step under way is saved first.
    """
    first = step = int(state.step)
    log = MetricLog(writer, learning_rate(config), config.batch_size)
    batches = itertools.islice(batches, config.steps - first)  # reads no batch it does not need
    with (
        cli.defer_signals(),
        contextlib.closing(prefetch.prefetch_batches(mesh, batches)) as placed,
        prefetch.IdleTimer() as idle,
        Progress("step", config.steps, first, "compiling, then the first step") as progress,
    ):
        while step < config.steps:
            batch, wait = idle.next(placed)
            state, metrics = step_fn(state, frozen, batch)
            idle.step_started(metrics)
            step += 1
            if (earlier := log.add(step, metrics, wait)) is not None:
                progress.advance(earlier)
            preempted = hosts.preempted()
            stop = preempted or cli.stop_requested()
            compiling, last = step == first + 1, step == config.steps
            if compiling or step % config.log_every == 0 or last:
                progress.advance(step, log.write(step, compiling=compiling))
                if compiling or last:
                    logging.info("%s", progress.line())
            if step % config.checkpoint_every == 0 or last or stop:
                log.fetch()  # so that no state with a non-finite loss is saved
                checkpoints.save(state, meta)
            if stop:
                _finish_early(checkpoints, step, preempted)
                break
            if config.eval_every and step % config.eval_every == 0 and not last:
                evaluate(state, step)
                log.reset_rates()
    checkpoints.wait()
    return state


def _finish_early(checkpoints: Checkpoints, step: int, preempted: bool) -> None:
    """Waits until the state is on disk; a preempted process got no signal itself, so it raises."""
    checkpoints.wait()
    logging.info("stopped by a signal after step %d; the state is saved", step)
    if preempted:
        raise cli.Interrupted(signal.SIGTERM)
