"""A profiler trace of some steps, for XProf."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from vop_jax.storage.files import replacing
from vop_jax.training.loop import Step
from vop_jax.training.step import Batch, Metrics, TrainState

FOLDER = "profile"  # in a workdir


@contextlib.contextmanager
def trace_steps(
    step_fn: Step, first: int, steps: tuple[int, int] | None, workdir: epath.Path
) -> Iterator[Step]:
    """Yields the step function, which traces the steps `steps[0]` to `steps[1]`; None for none.

    Args:
        first: the number of the step that the first call runs; a trace does not begin earlier.
    """
    if steps is None:
        yield step_fn
        return
    numbers = itertools.count(first)
    with contextlib.ExitStack() as trace:

        def traced(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
            step = next(numbers)
            if step == max(first, steps[0]) <= steps[1]:
                jax.block_until_ready(state)  # else the trace begins with earlier steps
                trace.enter_context(_trace(workdir / FOLDER))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, frozen, batch)
            if step == steps[1]:
                jax.block_until_ready(metrics)
                trace.close()
            return state, metrics

        yield traced


@contextlib.contextmanager
def _trace(folder: epath.Path) -> Iterator[None]:
    with replacing(folder) as partial:
        jax.profiler.start_trace(partial)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
    logging.info("the trace is in %s", folder)
