"""Training from frames that lie on the device: pace, and the share of time it waits for data.

    python -m benchmarks.epoch
    python -m benchmarks.epoch --clips 32 --batch 2 --steps 4 --dtype float32    # on a CPU

The whole of what a run does a step: draws of the host, brought over ahead; crops computed on the
device; the train step. The clips are random pixels of 240 x 320 made there, as many as MSR-VTT-9k
has; captions have all their slots. How long an epoch's pairs take is worked out from the pace.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.input import records, tokenized
from benchmarks.speed_jax import JaxPrograms, draw
from benchmarks.step_cost import Programs
from vop_jax.config.base import base_config
from vop_jax.config.clip import PRESETS
from vop_jax.data.pipeline import BatchSpec, train_batches
from vop_jax.data.records.read import Part
from vop_jax.experiment.kernels import best_kernel
from vop_jax.training import device_cache, prefetch, sharding
from vop_jax.training.step import TrainState, make_optimizer
from vop_jax.tuning.methods import MethodConfig

SHAPE = (240, 320)
REAL = 16  # clips whose records the host reads, again and again
WARM = 5  # steps


def random_frames(clips: int, frames: int) -> jax.Array:
    """uint8 [M, F, H, W, 3]."""

    def clip(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, (frames, *SHAPE, 3), jnp.uint8)

    return jax.jit(lambda key: jax.lax.map(clip, jax.random.split(key, clips)))(jax.random.key(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", choices=PRESETS, default="ViT-B/32")
    add("--method", default="vop")
    add("--clips", type=int, default=9000)
    add("--frames", type=int, default=12)
    add("--batch", type=int, default=64)
    add("--pairs", type=int, default=180_000, help="of an epoch")
    add("--steps", type=int, default=100)
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    clip = PRESETS[args.arch]
    method = MethodConfig(args.method, frames=args.frames)
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    kernel = best_kernel(args.dtype, mesh)
    programs = Programs(clip, method, args.frames, args.batch, args.dtype, kernel)
    flat, rows = draw(programs, clip)
    side = JaxPrograms(programs, clip, method, flat, {"ids": rows["ids"]})
    state = TrainState.create(side.trainable, make_optimizer(base_config().train))

    frames = random_frames(args.clips, args.frames)
    cache = device_cache.DeviceCache(mesh, frames, clip.image_size)
    with tempfile.TemporaryDirectory() as folder:
        split = records(folder, REAL)
        batches = train_batches(
            Part(split, "many", [i % REAL for i in range(args.clips)]),
            tokenized(split, method.text_slots(clip)),
            BatchSpec(args.batch, clip.image_size, args.frames),
            cached_shapes=[SHAPE] * args.clips,
        )
        waits: list[Callable[[], float]] = []
        left = itertools.islice(batches, WARM + args.steps)
        placing = contextlib.closing(prefetch.prefetch_batches(mesh, left))
        with placing as placed, prefetch.IdleTimer() as idle:
            for k in range(WARM + args.steps):
                if k == WARM:
                    jax.block_until_ready(state)
                    waits, begin = [], time.perf_counter()
                batch, wait = idle.next(placed)
                waits.append(wait)
                state, metrics = programs.step(state, side.frozen, cache.add_frames(batch))
                idle.step_started(metrics)
                if k % 20 == 0:  # as often as a run logs
                    jax.block_until_ready(metrics)
            jax.block_until_ready(state)
            elapsed = time.perf_counter() - begin
            waited = sum(wait() for wait in waits)
    pace = args.steps * args.batch / elapsed
    print(f"\n{args.arch}, {args.method}, {args.dtype}, batch {args.batch}; jax {jax.__version__},")
    print(f"{jax.devices()[0].device_kind}; {frames.nbytes / 1e9:.1f} GB of frames on it\n")
    print("| videos/s | ms a step | waiting for data | minutes for the pairs of an epoch |")
    print("| ---: | ---: | ---: | ---: |")
    ms, share = 1e3 * elapsed / args.steps, 100 * waited / elapsed
    print(f"| {pace:,.0f} | {ms:.1f} | {share:.1f} % | {args.pairs / pace / 60:.1f} |")


if __name__ == "__main__":
    main()
