"""What a training step costs: FLOPs as XLA counts them, and with --time its time and memory.

    python -m benchmarks.step_cost --arch ViT-B/32 --frames 12 --batch 2
    python -m benchmarks.step_cost --methods all --time 3

Prompt tuning needs the activations' gradients, not the frozen weights': its step should cost
about twice a forward pass, full tuning about three times.
"""

import argparse
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.clip.remat import Remat
from vop_jax.clip.weights import cast_frozen
from vop_jax.config.base import base_config
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.experiment.kernels import best_kernel
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.training.sharding import make_mesh
from vop_jax.training.step import TrainState, batch_loss, make_optimizer, make_train_step
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import merge, partition

Row = dict[str, Any]
PLAIN = Remat()


class Programs:
    """A method's forward pass and training step, each compiled on first use, for shapes alone.

    Args:
        kernel: of attention in the vision tower.
        remat, microbatches: what is saved for time, see docs/guides/memory.md.
        device: to compile for, which need not be there; the first of this machine by default.

    Attributes:
        model: what they compute.
        shapes: what `step` takes, (state, frozen, rows); `forward` takes (trainable, frozen, rows).
        compile_seconds: of either by name, once it is compiled.
    """

    def __init__(
        self,
        clip: ClipConfig,
        method: MethodConfig,
        frames: int,
        batch: int,
        dtype: str = "float32",
        kernel: Any = "xla",
        remat: Remat = PLAIN,
        microbatches: int = 1,
        device: Any = None,
    ):
        method = dataclasses.replace(method, frames=frames)
        model = self.model = TextVideoModel(clip, method, jnp.dtype(dtype), kernel, remat)
        pixels = (batch, frames, clip.image_size, clip.image_size, 3)
        rows = {
            "frames": jax.ShapeDtypeStruct(pixels, np.uint8),
            "ids": jax.ShapeDtypeStruct((batch, method.text_slots(clip)), np.int32),
        }
        params = tensors.unflatten(model.shapes())
        trainable, frozen = partition(params, method.trainable_patterns(clip))
        optimizer = make_optimizer(base_config().train)
        state = jax.eval_shape(lambda tree: TrainState.create(tree, optimizer), trainable)
        place = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
        self.shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            (state, cast_frozen(frozen, dtype), rows),
        )
        self.compile_seconds: dict[str, float] = {}
        self.train_step = make_train_step(model, optimizer, microbatches=microbatches)

    @functools.cached_property
    def forward(self) -> Any:
        """The loss alone."""

        return self._compiled("forward", jax.jit(self._forward), *self._forward_shapes())

    @functools.cached_property
    def step(self) -> Any:
        """The loss, its gradient and the optimizer's update; it consumes its state."""
        return self._compiled("step", jax.jit(self.train_step, donate_argnums=0), *self.shapes)

    def _compiled(self, name: str, function: Any, *shapes: Any) -> Any:
        begin = time.perf_counter()
        program = function.lower(*shapes).compile()
        self.compile_seconds[name] = time.perf_counter() - begin
        return program

    def _forward(self, trainable, frozen, rows):
        return batch_loss(self.model, merge(trainable, frozen), rows)

    def _forward_shapes(self) -> tuple:
        state, frozen, rows = self.shapes
        return state.trainable, frozen, rows

    def flops_of(self, name: str) -> float:
        """Of `forward` or `step`; of attention by "xla"."""
        if name == "step":
            return counted_flops(self.train_step, *self.shapes)
        return counted_flops(self._forward, *self._forward_shapes())

    def seconds(self, repeats: int) -> float:
        """Of a step on arbitrary values, the best of some."""
        rng = np.random.default_rng(0)

        def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
            if jnp.issubdtype(shape.dtype, jnp.floating):
                drawn = rng.standard_normal(shape.shape, np.float32) * 0.02
                return jnp.asarray(drawn, shape.dtype)
            return jnp.ones(shape.shape, shape.dtype)

        state, *others = jax.tree.map(fill, self.shapes)
        state, _ = jax.block_until_ready(self.step(state, *others))
        taken = []
        for _ in range(repeats):
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(self.step(state, *others))
            taken.append(time.perf_counter() - begin)
        return min(taken)


def flops(program: Any) -> float:
    """Of a program compiled for a CPU, as XLA counts them; a GPU's hides some in library calls."""
    return float(program.cost_analysis()["flops"])


def counted_flops(function: Any, *shapes: Any) -> float:
    """Of a function of such arguments, as XLA counts them on a CPU before it compiles."""
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])

    def on_cpu(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return flops(jax.jit(function).lower(*jax.tree.map(on_cpu, shapes)))


def peak_bytes(program: Any) -> int:
    """What a compiled program holds at once: arguments, results and everything between."""
    memory = program.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def step_flops(
    clip: ClipConfig, method: MethodConfig, frames: int, batch: int
) -> tuple[float, float]:
    """(forward, step): the loss alone, and a whole training step with its update."""
    programs = Programs(clip, method, frames, batch)
    return flops(programs.forward), flops(programs.step)


def measure(name: str, args: argparse.Namespace) -> Row:
    """One row of the table."""
    sizes = PRESETS[args.arch], MethodConfig(name), args.frames, args.batch
    programs = Programs(*sizes, args.dtype, args.attention)
    row: Row = {
        "method": name,
        "forward": programs.flops_of("forward"),
        "step": programs.flops_of("step"),
        "bytes": peak_bytes(programs.step),
    }
    return row | ({"seconds": programs.seconds(args.time)} if args.time else {})


def format_table(rows: list[Row]) -> str:
    """The rows in Markdown; time and memory also as ratios to the first row."""
    heading = ["method", "forward, GFLOP", "step, GFLOP", "step / forward", "peak, GB", "of first"]
    timed = "seconds" in rows[0]
    heading += ["step, s", "of first"] if timed else []
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)]]
    for row in rows:
        line = [
            row["method"],
            f"{row['forward'] / 1e9:.1f}",
            f"{row['step'] / 1e9:.1f}",
            f"{row['step'] / row['forward']:.3f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['bytes'] / rows[0]['bytes']:.2f}",
        ]
        if timed:
            line += [f"{row['seconds']:.3f}", f"{row['seconds'] / rows[0]['seconds']:.2f}"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=PRESETS, default="ViT-B/32")
    parser.add_argument("--frames", type=int, default=12, help="of a clip")
    parser.add_argument("--batch", type=int, default=2, help="pairs of clip and caption")
    tuned = ["vop", *(n for n, method in METHODS.items() if method.trainable and n != "vop")]
    parser.add_argument("--methods", nargs="+", choices=[*tuned, "all"], default=["vop", "full"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--attention",
        choices=("auto", "xla", "fused", "cudnn"),
        default="auto",
        help="see config.compute.attention",
    )
    parser.add_argument("--time", type=int, default=0, help="repeats; 0: count only")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    if args.attention == "auto":
        args.attention = best_kernel(args.dtype, make_mesh(1, devices=jax.devices()[:1]))
    rows = []
    for name in tuned if "all" in args.methods else args.methods:
        rows.append(measure(name, args))
        print(json.dumps(rows[-1]), flush=True)
    device = jax.devices()[0]
    where = f"jax {jax.__version__}, {device.platform} ({device.device_kind}), {args.dtype}"
    print(f"\n{args.arch}, {args.frames} frames, batch {args.batch}, {where}\n")
    print(format_table(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "jax": jax.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
