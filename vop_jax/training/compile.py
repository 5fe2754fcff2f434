"""The step compiled ahead of its first run: how long that took, and whether it fits the device."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from vop_jax.errors import UserError
from vop_jax.training import sharding
from vop_jax.training.flops import matmul_flops, matmul_flops_per_second
from vop_jax.training.step import Batch, Metrics, TrainState

HELP = (
    "config.compute.remat='full', compute.frame_chunk, train.microbatches, compute.dtype="
    "'bfloat16', mesh.fsdp or a smaller train.batch_size (docs/memory.md says which first)"
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of one device that a program takes, by the compiler's account.

    Attributes:
        held: what goes in and comes out: parameters, state and a batch.
        between: what exists only while it runs: activations.
        others: of arrays that have nothing to do with the program.
        limit: what the device has; None where it does not say.
    """

    held: int
    between: int
    others: int = 0
    limit: int | None = None

    @classmethod
    def of(cls, program: Any, device: jax.Device | None = None) -> "Estimate | None":
        """Of a compiled program, and what its device says; None where the compiler is silent."""
        memory = program.memory_analysis()
        if memory is None:
            return None
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        held, between = memory.argument_size_in_bytes + results, memory.temp_size_in_bytes
        stats = (device.memory_stats() if device else None) or {}
        others = max(0, stats.get("bytes_in_use", 0) - memory.argument_size_in_bytes)
        return cls(held, between, others, stats.get("bytes_limit"))

    @property
    def total(self) -> int:
        return self.held + self.between + self.others

    def __str__(self) -> str:
        parts = f"{_gb(self.held)} parameters, state and batch, {_gb(self.between)} activations"
        beside = f", {_gb(self.others)} other arrays" if self.others else ""
        return f"{_gb(self.total)} GB of a device: {parts}{beside}"

    def check(self) -> None:
        """Raises UserError when the device has less."""
        if self.limit is not None and self.total > self.limit:
            has, missing = _gb(self.limit), _gb(self.total - self.limit)
            raise UserError(
                f"a step needs {self}; it has {has}, {missing} GB are missing: set {HELP}"
            )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"


class CompiledStep:
    """A train step that is compiled once for each shape of a batch, and says what it takes.

    Attributes:
        programs: the compiled ones, by the shapes of their batch.
    """

    def __init__(
        self,
        step: Callable[..., tuple[TrainState, Metrics]],
        mesh: Mesh,
        widths: Sequence[int] = (),
        steps: int = 0,
        dtype: str = "float32",
    ):
        """`widths`: of captions, that batches will have; compiled side by side at the first.

        With `steps` that are to be run, and the dtype of products, their time is estimated.
        """
        self._step, self._mesh, self._widths = step, mesh, widths
        self._steps, self._dtype = steps, dtype
        self.programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        """The step; consumes `state`.

        Raises:
            UserError: it does not fit the device.
        """
        shapes = _shapes(batch)
        if shapes not in self.programs:
            self._compile(state, frozen, batch)
        return self.programs[shapes](state, frozen, batch)

    def _compile(self, state: TrainState, frozen: Any, batch: Batch) -> None:
        """For this batch and, the first time, for those that differ in their captions' width."""
        batches: list[dict[str, Any]] = [batch]
        if not self.programs:
            batches += [_as_wide(batch, w) for w in self._widths if w != batch["ids"].shape[1]]
        # The state comes out where it went in, so that the same program takes it again.
        places = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(self._mesh)
        jitted = jax.jit(self._step, donate_argnums=0, out_shardings=places)
        since = time.perf_counter()
        try:
            traced = [jitted.trace(state, frozen, rows) for rows in batches]
            lowered = [program.lower() for program in traced]
            with ThreadPoolExecutor(len(lowered)) as pool:
                programs = list(pool.map(lambda program: program.compile(), lowered))
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler knows the limit itself
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = " ".join(str(error).split())[:300]
            raise UserError(f"a step does not fit a device ({line}): set {HELP}") from None
        taken = time.perf_counter() - since
        found = [Estimate.of(program, self._mesh.local_devices[0]) for program in programs]
        largest = max((x for x in found if x), key=lambda x: x.total, default=None)
        widths = sorted(rows["ids"].shape[1] for rows in batches)
        of = f" for captions of {' and '.join(map(str, widths))} slots" if len(widths) > 1 else ""
        told = largest or "its memory is not known"
        logging.info("step%s compiled in %.1f s; %s", of, taken, told)
        if largest:
            largest.check()
            self._compare(largest)
        if self._steps and not self.programs:
            self._estimate(max(matmul_flops(program.jaxpr) for program in traced))
        self.programs |= zip(map(_shapes, batches), programs, strict=True)

    def _compare(self, estimate: Estimate) -> None:
        """Warns where this machine's memory, which is that of CPU devices, may not be enough."""
        free = available_memory() if self._mesh.local_devices[0].platform == "cpu" else None
        needed = estimate.between * len(self._mesh.local_devices)
        if free is not None and needed > free:
            message = "a step takes %s GB more, this machine has %s free: set %s"
            logging.warning(message, _gb(needed), _gb(free), HELP)

    def _estimate(self, flops: float) -> None:
        """Says how long the steps take at least."""
        device = self._mesh.local_devices[0]
        # Where the compiler shares the work out, the program is that of all devices together.
        flops /= self._mesh.size if sharding.shards_parameters(self._mesh) else 1
        rate = matmul_flops_per_second(self._dtype, device.platform)
        logging.info(
            "%d steps take %s or more: %.3g GFLOP of matrix products each, %.3g GFLOP/s measured",
            *(self._steps, timedelta(seconds=round(self._steps * flops / rate))),
            *(flops / 1e9, rate / 1e9),
        )


def available_memory() -> int | None:
    """Bytes that programs can still have on this machine; None where it is not Linux."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _shapes(batch: dict[str, Any]) -> tuple:
    return tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))


def _as_wide(batch: Batch, width: int) -> dict[str, Any]:
    """A batch, as far as the compiler sees it, with captions of so many slots."""
    ids = batch["ids"]
    shape = (*ids.shape[:-1], width)
    return {**batch, "ids": jax.ShapeDtypeStruct(shape, ids.dtype, sharding=ids.sharding)}
