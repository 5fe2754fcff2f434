"""The loop: batches in, steps, and at their times metrics, evaluations and checkpoints."""

import contextlib
import dataclasses
import itertools
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
from vop_jax.training.step import Batch, Metrics, TrainState
from vop_jax.training.writer import NoWriter

STARTED = 4  # steps that devices have before them at most, each with its batch in their memory

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the newest checkpoint is from before it."""


@dataclasses.dataclass
class Clock:
    """What a stretch of steps spent its time on."""

    videos: int = 0
    waits: list[Callable[[], float]] = dataclasses.field(default_factory=list)  # `prefetch.Idle`'s
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def rates(self) -> dict[str, float]:
        """Videos a second, and the share of the time that devices stood still for batches."""
        elapsed = time.perf_counter() - self.started
        waited = sum(wait() for wait in self.waits)
        return {"videos_per_second": self.videos / elapsed, "data_wait": waited / elapsed}


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
    schedule: Callable[[int], Any],
    evaluate: Callable[[TrainState, int], object],
) -> TrainState:
    """Trains from `state.step` to `config.steps` and returns the last state, saved.

    Args:
        step_fn: the jitted or compiled step; it may consume `state`.
        frozen: the frozen parameters on the mesh.
        batches: this process's rows of batches `state.step`, `state.step + 1`, …
        config: the config's section `train`.
        meta: JSON saved beside each checkpoint.
        schedule: step -> learning rate, for the log.
        evaluate: called with (state, step) every `eval_every` steps, not after the last.

    Raises:
        NonFiniteLoss: names the first step whose loss or gradient is not finite.
        Interrupted: a signal; the state after the step under way is saved first.
    """
    first = step = int(state.step)
    unread: list[tuple[int, Metrics]] = []  # not fetched yet, so that the device runs ahead
    clock = Clock()
    left = itertools.islice(batches, config.steps - first)  # none is read that is not needed
    with (
        cli.deferred(),
        contextlib.closing(prefetch.placed(mesh, left)) as placed,
        prefetch.Idle() as idle,
        Progress("step", config.steps, first, "compiling, then the first step") as progress,
    ):
        while step < config.steps:
            batch, wait = idle.next(placed)
            clock.waits.append(wait)
            state, metrics = step_fn(state, frozen, batch)
            idle.ran(metrics)
            step += 1
            clock.videos += config.batch_size
            unread.append((step, metrics))
            if len(unread) >= STARTED:
                jax.block_until_ready(unread[-STARTED][1])
                progress.advance(step - STARTED + 1)
            preempted = hosts.preempted()
            stop = preempted or cli.requested()
            last = step == config.steps
            if step == first + 1 or step % config.log_every == 0 or last:
                note = _log(unread, step, clock, writer, schedule, compiling=step == first + 1)
                progress.advance(step, note)
                if step == first + 1 or last:
                    logging.info("%s", progress.line())
                unread, clock = [], Clock()
            if step % config.checkpoint_every == 0 or last or stop:
                _fetch(unread)
                checkpoints.save(state, meta)
            if stop:
                checkpoints.wait()
                logging.info("stopped by a signal after step %d; the state is saved", step)
                if preempted:
                    hosts.stop()
                break
            if config.eval_every and step % config.eval_every == 0 and not last:
                evaluate(state, step)
                clock = Clock()
    checkpoints.wait()
    return state


def _log(
    unread: list[tuple[int, Metrics]],
    step: int,
    clock: Clock,
    writer: NoWriter,
    schedule: Callable[[int], Any],
    *,
    compiling: bool,
) -> str:
    """Writes the mean of the metrics since the last line; returns what people read of it."""
    values = _fetch(unread)
    scalars = {key: float(np.mean([v[key] for v in values])) for key in values[0]}
    scalars["learning_rate"] = float(schedule(step - 1))
    if not compiling:  # the first step's time is the compiler's
        scalars |= clock.rates()
    writer.write_scalars(step, scalars)
    note = f"loss {scalars['loss']:.4f}"
    if compiling:
        return note
    speed, wait = scalars["videos_per_second"], scalars["data_wait"]
    return f"{note}  {speed:.1f} videos/s  {wait:.0%} waiting for data"


def _fetch(unread: list[tuple[int, Metrics]]) -> list[dict[str, float]]:
    """Waits for the metrics of these steps; raises NonFiniteLoss at the first bad one."""
    values = [{key: float(v) for key, v in jax.device_get(m).items()} for _, m in unread]
    for (step, _), value in zip(unread, values, strict=True):
        for key, number in value.items():
            if not np.isfinite(number):
                raise NonFiniteLoss(f"{key} is {number} at step {step}")
    return values
