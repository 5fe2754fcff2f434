"""The train step, compiled before its first run: its memory, its FLOPs and the time they take."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from vop_jax.clip.kernels import products
from vop_jax.errors import UserError
from vop_jax.training import hosts, malloc, sharding
from vop_jax.training.step import Batch, Metrics, TrainState

HELP = (
    "config.compute.remat='full', compute.frame_chunk, train.microbatches, compute.dtype="
    "'bfloat16', mesh.fsdp or a smaller train.batch_size (docs/guides/memory.md says which first)"
)
CGROUP = "/sys/fs/cgroup"  # of the container, in version 2


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device that a program takes, as its compiler reports them.

    Attributes:
        arguments: inputs and outputs: parameters, state and a batch.
        activations: temporary arrays, which exist only while the program runs.
        other: arrays on the device that do not belong to the program.
        limit: the memory of the device; None where the device does not report it.
    """

    arguments: int
    activations: int
    other: int = 0
    limit: int | None = None

    @classmethod
    def of(cls, program: Any, device: jax.Device | None = None) -> "MemoryEstimate | None":
        """The estimate for a compiled program; None where its compiler reports nothing."""
        memory = program.memory_analysis()
        if memory is None:
            return None
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        stats = (device.memory_stats() if device else None) or {}
        other = max(0, stats.get("bytes_in_use", 0) - memory.argument_size_in_bytes)
        arguments = memory.argument_size_in_bytes + outputs
        return cls(arguments, memory.temp_size_in_bytes, other, stats.get("bytes_limit"))

    @property
    def total(self) -> int:
        return self.arguments + self.activations + self.other

    def __str__(self) -> str:
        other = f", {_gb(self.other)} other arrays" if self.other else ""
        return (
            f"{_gb(self.total)} GB of a device: {_gb(self.arguments)} parameters, state and batch, "
            f"{_gb(self.activations)} activations{other}"
        )

    def check(self) -> None:
        """Raises UserError when the device has less memory."""
        if self.limit is not None and self.total > self.limit:
            raise UserError(
                f"a step needs {self}; it has {_gb(self.limit)}, {_gb(self.total - self.limit)} GB "
                f"are missing: set {HELP}"
            )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"


class CompiledStep:
    """A train step that is compiled once for each shape of a batch and logs what it takes.

    Attributes:
        programs: the compiled programs by the shapes of their batch.
    """

    def __init__(
        self,
        make_step: Callable[[int], Callable[..., tuple[TrainState, Metrics]]],
        mesh: Mesh,
        microbatches: int = 0,
        meta: dict[str, Any] | None = None,
        widths: Sequence[int] = (),
        steps: int = 0,
        dtype: str = "float32",
    ):
        """Compiles nothing yet.

        Args:
            make_step: returns the step for a number of microbatches.
            microbatches: their number; 0 takes the smallest with which the step fits in memory.
            meta: of the run's checkpoints. Its "microbatch" is the most rows that a device embeds
                at a time; a number that is chosen here is written there, so that a continued run
                chooses it again.
            widths: the token slots T that batches of captions will have; the programs for all of
                them are compiled in parallel before the first step.
            steps: how many will run, to log how long they take; 0 logs nothing.
            dtype: of the matrix products.
        """
        self._make_step, self._mesh, self._microbatches = make_step, mesh, microbatches
        self._meta = {} if meta is None else meta
        self._widths, self._steps, self._dtype = widths, steps, dtype
        self.programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs the step; consumes `state`.

        Raises:
            UserError: the step does not fit the device.
        """
        shapes = _shapes(batch)
        if shapes not in self.programs:
            self._compile(state, frozen, batch)
        return self.programs[shapes](state, frozen, batch)

    def _compile(self, state: TrainState, frozen: Any, batch: Batch) -> None:
        """For this batch and, the first time, for all other widths of its captions."""
        batches: list[dict[str, Any]] = [batch]
        if not self.programs:
            others = (width for width in self._widths if width != batch["ids"].shape[1])
            batches += [_with_width(batch, width) for width in others]
        rows = len(batch["ids"]) // sharding.row_shards(self._mesh)
        counts = [self._microbatches] if self._microbatches else self._possible_counts(rows)
        while True:
            try:
                traced, programs, memory = self._compile_all(counts[0], state, frozen, batches)
                enough = self._enough(counts, memory)
            except UserError as error:  # the compiler found that it does not fit
                if len(counts) == 1:
                    raise
                logging.info("train.microbatches=%d: %s", counts[0], error)
                enough = counts[1]
            enough = hosts.largest(enough)
            if enough == counts[0]:
                break
            counts = counts[counts.index(enough) :]
        if memory:
            self._check_memory(memory)
        if not self._microbatches:
            self._microbatches, self._meta["microbatch"] = enough, rows // enough
        if self._steps and not self.programs:
            self._log_duration(max(matmul_flops(program.jaxpr) for program in traced))
        self.programs |= zip(map(_shapes, batches), programs, strict=True)

    def _possible_counts(self, rows: int) -> list[int]:
        """The numbers of microbatches to choose from, in rising order."""
        most = self._meta.get("microbatch") or rows
        return [count for count in sharding.divisors(rows) if rows // count <= most]

    def _compile_all(
        self, microbatches: int, state: TrainState, frozen: Any, batches: list[dict[str, Any]]
    ) -> tuple[list[Any], list[Any], MemoryEstimate | None]:
        """(programs as traced, as compiled, the largest estimate), and logs what they take.

        Raises:
            UserError: the compiler found that a program does not fit.
        """
        # The state leaves with the sharding it came with, so that the program takes it again.
        shardings = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(self._mesh)
        step = self._make_step(microbatches)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        start = time.perf_counter()
        try:
            traced = [jitted.trace(state, frozen, rows) for rows in batches]
            lowered = [program.lower() for program in traced]
            with ThreadPoolExecutor(len(lowered)) as pool:
                programs = list(pool.map(lambda program: program.compile(), lowered))
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler checks the limit itself
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = " ".join(str(error).split())[:300]
            raise UserError(f"a step does not fit a device ({line}): set {HELP}") from None
        seconds = time.perf_counter() - start
        estimates = [MemoryEstimate.of(p, self._mesh.local_devices[0]) for p in programs]
        largest = max((e for e in estimates if e), key=lambda e: e.total, default=None)
        widths = " and ".join(map(str, sorted(rows["ids"].shape[1] for rows in batches)))
        captions = f" for captions of {widths} slots" if len(batches) > 1 else ""
        memory = largest or "its memory is not known"
        logging.info("step%s compiled in %.1f s; %s", captions, seconds, memory)
        return traced, programs, largest

    def _enough(self, counts: Sequence[int], memory: MemoryEstimate | None) -> int:
        """The first of these numbers of microbatches that may fit, else the last.

        Args:
            memory: the estimate for `counts[0]`; None where the compiler reports nothing.
        """
        free = self._free_for_activations(memory) if memory else None
        if memory is None or free is None:
            return counts[0]
        # Twice as many microbatches halve activations at best.
        fits = (count for count in counts if memory.activations * counts[0] <= free * count)
        enough = next(fits, counts[-1])
        if enough > 1:
            logging.info(
                "train.microbatches=%d: activations take %s GB of a device, %s are free%s",
                *(counts[0], _gb(memory.activations), _gb(max(0, free))),
                "" if enough == counts[0] else f"; compiling for {enough}",
            )
        return enough

    def _free_for_activations(self, memory: MemoryEstimate) -> int | None:
        """Bytes of one device; None where they are not known."""
        if memory.limit is not None:
            return memory.limit - memory.arguments - memory.other
        devices = self._mesh.local_devices
        free = available_memory() if devices[0].platform == "cpu" else None
        return None if free is None else free // len(devices)

    def _check_memory(self, memory: MemoryEstimate) -> None:
        """Refuses what a device lacks memory for; CPU devices, which share it, have a warning."""
        memory.check()
        free, devices = self._free_for_activations(memory), len(self._mesh.local_devices)
        if free is not None and memory.activations > free:
            message = "a step takes %s GB more, this machine has %s free: set %s"
            logging.warning(message, _gb(memory.activations * devices), _gb(free * devices), HELP)
        if free is not None and 2 * memory.activations > free:
            malloc.return_large_blocks()

    def _log_duration(self, flops: float) -> None:
        """Logs the shortest time that all steps can take."""
        # Where the compiler distributes the work, the traced program is that of all devices.
        flops /= self._mesh.size if sharding.shards_parameters(self._mesh) else 1
        rate = products.flops_per_second(self._dtype, self._mesh.local_devices[0])
        logging.info(
            "%d steps take %s or more: %.3g GFLOP of matrix products each, %.3g GFLOP/s measured",
            *(self._steps, timedelta(seconds=round(self._steps * flops / rate))),
            *(flops / 1e9, rate / 1e9),
        )


def available_memory() -> int | None:
    """Bytes that a step can take of this machine's or container's memory; None off Linux.

    These are four fifths of what is free: steps take up to a quarter more than their estimates.
    """
    free = []
    with contextlib.suppress(OSError, KeyError):
        free.append(_counts("/proc/meminfo")["MemAvailable:"] * 1024)
    with contextlib.suppress(OSError, KeyError, ValueError):  # no limit is the word "max"
        limit = int(pathlib.Path(f"{CGROUP}/memory.max").read_text())
        free.append(max(0, limit - _counts(f"{CGROUP}/memory.stat")["anon"]))
    return min(free) * 4 // 5 if free else None


def _counts(path: str) -> dict[str, int]:
    """{name: number} of the lines of a file of the kernel."""
    rows = (line.split() for line in pathlib.Path(path).read_text().splitlines())
    return {name: int(number) for name, number, *_ in rows}


def _shapes(batch: dict[str, Any]) -> tuple:
    return tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))


def _with_width(batch: Batch, width: int) -> dict[str, Any]:
    """A batch, as the compiler sees it, with captions of this many slots."""
    ids = batch["ids"]
    shape = (*ids.shape[:-1], width)
    return {**batch, "ids": jax.ShapeDtypeStruct(shape, ids.dtype, sharding=ids.sharding)}


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of a traced program's matrix products; inside `shard_map`, those of one device.

    XLA's own count does not serve: it counts the body of a loop once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * equation.outvars[0].aval.size
        turns = params["length"] if name == "scan" else 1
        if name == "pallas_call":
            turns = math.prod(params["grid_mapping"].grid)
        inner_flops = map(matmul_flops, _subprograms(params))
        # One branch runs.
        total += turns * (max if name == "cond" else sum)(inner_flops)
    return total


def _subprograms(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an operation calls."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
