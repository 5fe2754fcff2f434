"""How fast this is: JAX against a PyTorch that does the same, on one device, in one run.

    python -m benchmarks.speed --json speed.json
    python -m benchmarks.speed --methods vop --batch 2 --frames 12 --dtype float32 --repeats 3

For each method the forward pass (loss, no gradient), the train step (loss, gradient of what is
trained, AdamW) and the evaluation (embedding, then ranking) of the same clips, captions and
weights. The repeats of all variants alternate, so that what else the machine does hits all of
them; each is as fast as its best repeat. FLOPs are XLA's count of the JAX program, the same for
all; their share is of the device's own product of two large matrices, measured here, too.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory as well

import jax

from benchmarks.speed_jax import JaxPrograms, draw, matmul
from benchmarks.step_cost import Programs
from vop_jax.config.clip import PRESETS
from vop_jax.experiment.kernels import best_kernel
from vop_jax.storage.tensors import flatten
from vop_jax.training import malloc
from vop_jax.training.sharding import make_mesh
from vop_jax.tuning.methods import METHODS, MethodConfig

try:
    import torch

    from benchmarks import speed_torch
except ImportError:  # then the table is of JAX alone
    torch = None  # type: ignore[assignment]

WHAT = ("forward", "step", "evaluation")
Row = dict[str, Any]


Made = tuple[Callable[[], Any], Callable[[], int | None]]  # (what starts a run, peak bytes then)


@dataclasses.dataclass
class Contender:
    """One line of the table before it is measured.

    Attributes:
        name: framework and variant.
        make: puts everything on the device, compiles where that is apart from running.
        wait: for what a run returned.
        compiles: whether the first run compiles.
        measurement: filled when it runs; "error" alone where it failed.
    """

    name: str
    make: Callable[[], Made]
    wait: Callable[[Any], Any]
    compiles: bool
    measurement: Row = dataclasses.field(default_factory=dict)

    def warm_up(self) -> None:
        self.run, peak = self.make()
        first, again = self.seconds(1), self.seconds(1)
        self.measurement |= {"peak_bytes": peak(), "seconds": []}
        if self.compiles:
            self.measurement["compile"] = max(first - again, 0.0)

    def repeat(self, calls: int) -> None:
        self.measurement["seconds"].append(self.seconds(calls))

    def seconds(self, calls: int) -> float:
        """Of one run, the mean of some that are started before the last is waited for."""
        begin = time.perf_counter()
        for _ in range(calls):
            last = self.run()
        self.wait(last)
        return (time.perf_counter() - begin) / calls

    def survives(self, work: Callable[..., None], *arguments: Any) -> bool:
        """Whether `work` went well; what went wrong stands in `measurement`."""
        try:
            work(*arguments)
        except Exception as error:  # out of memory, no compiler: the others go on
            text = " ".join(str(error).split()) or "no message"
            self.measurement = {"error": f"{type(error).__name__}: {text[:120]}"}
            return False
        return True


def race(contenders: list[Contender], repeats: int, calls: int) -> None:
    """Warms all up, then times them in turn."""
    alive = [c for c in contenders if c.survives(c.warm_up)]
    for _ in range(repeats):
        alive = [c for c in alive if c.survives(c.repeat, calls)]


class Competition:
    """One method's programs in both frameworks, over the same weights and rows."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, self.clip = name, args, PRESETS[args.arch]
        self.method = dataclasses.replace(MethodConfig(name), frames=args.frames)
        # Never compiled unless "xla" is measured: what others are counted by.
        self.programs = {"xla": self._programs("xla")}
        self.flat, self.rows = draw(self.programs["xla"], self.clip)

    def _programs(self, kernel: str) -> Programs:
        a = self.args
        sizes = self.clip, self.method, a.frames, a.batch, a.dtype
        return Programs(*sizes, kernel=kernel)

    def rows_of(self, what: str) -> list[Row]:
        """The table's rows for "forward", "step" or "evaluation"."""
        contenders = [self._of_jax(kernel, what) for kernel in self.args.attention]
        contenders += [self._of_torch(mode, what) for mode in (None, *self.args.compile_modes)]
        race(contenders, self.args.repeats, self.args.calls)
        videos = self.args.eval_videos if what == "evaluation" else self.args.batch
        # Of a batch; of an evaluation those of its forward pass.
        flops = self.programs["xla"].flops_of("step" if what == "step" else "forward")
        flops *= videos / self.args.batch
        setting = {"method": self.name, "what": what, "videos": videos, "flops": flops}
        return [{**setting, "variant": c.name, **c.measurement} for c in contenders]

    def _of_jax(self, kernel: str, what: str) -> Contender:
        def make() -> Made:
            if kernel not in self.programs:
                self.programs[kernel] = self._programs(kernel)
            programs = self.programs[kernel]
            side = JaxPrograms(programs, self.clip, self.method, self.flat, self.rows)
            run = side.program(what, self.args.eval_videos)
            if what in programs.compile_seconds:
                contender.measurement["compile"] = programs.compile_seconds[what]
            return run, lambda: side.peak_bytes(what)

        first = kernel == self.args.attention[0]
        name = "JAX" if first else f"JAX, {kernel} attention"
        contender = Contender(name, make, jax.block_until_ready, what == "evaluation")
        return contender

    def _of_torch(self, mode: str | None, what: str) -> Contender:
        def make() -> Made:
            if torch is None:
                raise RuntimeError("torch is not installed")
            names = list(flatten(self.programs["xla"].shapes[0].trainable))
            sizes = self.clip, self.method, self.args.dtype
            side = speed_torch.TorchPrograms(*sizes, self.flat, names, self.rows)
            peak = speed_torch.PeakBytes(side.bytes_held())
            return side.program(what, mode, self.args.eval_videos), peak.ran

        name = "PyTorch eager" if mode is None else f"torch.compile, {mode}"
        return Contender(name, make, lambda _: speed_torch.wait(), mode is not None)


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def threads() -> int:
    """The CPU cores this process may use; XLA takes all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matmul_peak(size: int, dtype: str, calls: int) -> float:
    """FLOP/s of the faster framework's product of two matrices [size, size]."""
    contenders = [
        Contender("JAX", lambda: (matmul(size, dtype), lambda: None), jax.block_until_ready, True)
    ]
    if torch is not None:
        product = speed_torch.matmul(size, dtype), lambda: None
        contenders.append(Contender("torch", lambda: product, lambda _: speed_torch.wait(), False))
    race(contenders, 10, calls)
    measurements = [c.measurement for c in contenders if "seconds" in c.measurement]
    return 2 * size**3 / min(min(each["seconds"]) for each in measurements)


def format_table(rows: list[Row], peak: float) -> str:
    """The rows in Markdown; `peak` is of `matmul_peak`."""
    heading = ["method", "what", "variant", "ms", "of JAX", "videos/s", "GFLOP/s", "of matmul"]
    heading += ["peak, GB", "compile, s"]
    lines = [heading, ["---"] * 3 + ["---:"] * (len(heading) - 3)]
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        line = [row["method"], row["what"], row["variant"]]
        if "error" in row:
            line += [row["error"].replace("|", "/"), *[""] * (len(heading) - 4)]
        else:
            best = min(row["seconds"])
            jax_best = first.setdefault((row["method"], row["what"]), best)
            line += [f"{1e3 * best:,.1f}", f"{best / jax_best:.2f}", f"{row['videos'] / best:,.2f}"]
            rate = (row["flops"] or math.nan) / best
            line += [f"{rate / 1e9:,.1f}", f"{100 * rate / peak:.0f} %"]
            held, compiled = row.get("peak_bytes"), row.get("compile")
            line += ["" if held is None else f"{held / 1e9:.2f}"]
            line += ["" if compiled is None else f"{compiled:.1f}"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parsed() -> argparse.Namespace:
    gpu = on_gpu()
    cpu = jax.default_backend() == "cpu"
    tuned = [name for name, method in METHODS.items() if method.trainable]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", choices=PRESETS, default="ViT-B/32")
    add("--methods", nargs="+", choices=tuned, default=["vop", "vop_f", "vop_c", "full"])
    add("--what", nargs="+", choices=WHAT, default=WHAT)
    add("--frames", type=int, default=12, help="of a clip")
    add("--batch", type=int, default=2 if cpu else 64, help="pairs of clip and caption")
    add("--eval_videos", type=int, help="of an evaluation; 4 batches if not said, 16 off the CPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32" if cpu else "bfloat16")
    add("--repeats", type=int, default=3 if cpu else 10)
    add("--calls", type=int, default=1 if cpu else 10, help="in a repeat, waited for at its end")
    add("--matmul", type=int, default=2048 if cpu else 8192, help="rows of the peak's matrices")
    modes = ["default", "reduce-overhead", "max-autotune"]
    add("--compile_modes", nargs="*", choices=modes, default=modes[:2] if gpu else modes[:1])
    kernels = ["fused", "cudnn", "xla"]
    add("--attention", nargs="+", choices=kernels, help="of JAX; what a run takes if not said")
    add("--json", metavar="FILE", help="also write all repeats here")
    args = parser.parse_args()
    mesh = make_mesh(1, devices=jax.devices()[:1])
    args.attention = args.attention or [best_kernel(args.dtype, mesh)]
    args.eval_videos = args.eval_videos or args.batch * (4 if cpu else 16)
    if args.eval_videos % args.batch:
        parser.error(f"--eval_videos={args.eval_videos}: not a multiple of --batch={args.batch}")
    return args


def main() -> None:
    args = parsed()
    malloc.keep_freed_memory()
    if torch is not None:
        speed_torch.prepare(threads())
    peak = matmul_peak(args.matmul, args.dtype, args.calls)
    rows: list[Row] = []
    for name in args.methods:
        competition = Competition(name, args)
        for what in args.what:
            measured_rows = competition.rows_of(what)
            print(*map(json.dumps, measured_rows), sep="\n", flush=True)
            rows += measured_rows
            gc.collect()  # what the contenders held
    peak = max(peak, matmul_peak(args.matmul, args.dtype, args.calls))  # the machine may be noisy
    device = jax.devices()[0]
    about = {
        "jax": jax.__version__,
        "torch": None if torch is None else torch.__version__,
        "device": device.device_kind,
        "threads": threads(),
        "matmul_flops_per_second": peak,
        "process_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }
    sizes = f"{args.arch}, {args.frames} frames, batch {args.batch}, {args.dtype}"
    print(f"\n{sizes}; " + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(format_table(rows, peak))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), **about, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
