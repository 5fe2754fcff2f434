"""What of a step of vop_c its recurrence takes: the LSTM over frames, both directions, all layers.

    python -m benchmarks.recurrence --arch ViT-B/32 --frames 12 --batch 8
    python -m benchmarks.recurrence --batch 64 --dtype bfloat16        # on an accelerator

The LSTM's forward and backward pass, alone, once for each layer that has a context, is timed in
turns with the whole step. Within the step other work may run beside it, or take its place in a
cache.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed_jax import JaxPrograms, draw
from benchmarks.step_cost import Programs
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.experiment.kernels import best_kernel
from vop_jax.training.sharding import make_mesh
from vop_jax.tuning.context import Lstm
from vop_jax.tuning.methods import MethodConfig


def alone(clip: ClipConfig, method: MethodConfig, batch: int, dtype: str) -> Callable[[], Any]:
    """The gradient of vop_c's LSTM, one for all layers with a context, on [B, F, D] of each."""
    lstm = Lstm(clip.vision_width, dtype=jnp.dtype(dtype))
    layers = len(method.layers(clip.vision_layers))
    shape = (layers, batch, method.frames, clip.vision_width)
    cls = jax.random.normal(jax.random.key(0), shape, dtype)
    params = jax.jit(lstm.init)(jax.random.key(1), cls[0])

    def total(params, cls):
        # Each waits for the one before it, as layers do.
        carried = jnp.zeros((), jnp.float32)
        for own in cls:
            out: Any = lstm.apply(params, own + carried.astype(own.dtype) * 1e-9)
            carried = jnp.sum(jnp.square(out.astype(jnp.float32)))
        return carried

    program = jax.jit(jax.grad(total, argnums=(0, 1)))
    return lambda: program(params, cls)


def measure(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each, the median of as many turns."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append(time.perf_counter() - begin)
    return {name: float(np.median(times)) for name, times in taken.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.recurrence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", choices=PRESETS, default="ViT-B/32")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="pairs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    clip = PRESETS[args.arch]
    method = MethodConfig("vop_c", frames=args.frames)
    kernel = best_kernel(args.dtype, make_mesh(1, devices=jax.devices()[:1]))
    programs = Programs(clip, method, args.frames, args.batch, args.dtype, kernel)
    whole = JaxPrograms(programs, clip, method, *draw(programs, clip))
    seconds = measure(
        {
            "step": whole.program("step", args.batch),
            "recurrence": alone(clip, method, args.batch, args.dtype),
        },
        args.repeats,
    )
    device = jax.devices()[0].device_kind
    share = seconds["recurrence"] / seconds["step"]
    print(json.dumps(vars(args) | {"device": device, "seconds": seconds, "share": share}))


if __name__ == "__main__":
    main()
