"""What feeds the chip: how fast batches come, what waiting for them costs, what a cache takes.

    python -m benchmarks.input

Clips as in `benchmarks.prepare`, packed as records of 12 frames of 240 x 320 pixels. The supply
is counted in clips a second that the host gets ready, without a model. Waiting is that of a
loop with a small model: batches read between the steps, read ahead, and cut out of frames that
are on the device. FLOPs are XLA's.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.prepare import make_clip
from benchmarks.step_cost import Programs, counted_flops
from vop_jax.config.base import base_config
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.data.clips import VideoClip
from vop_jax.data.pipeline import BatchSpec, train_batches
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.read import Part, Split, decode_clips, frame_shapes
from vop_jax.data.records.write import WriteOptions, pack
from vop_jax.data.tokenizer import CaptionTokenizer, TokenizedCaptions
from vop_jax.model import TextVideoModel
from vop_jax.training import device_cache, prefetch, sharding
from vop_jax.training.step import TrainState, make_optimizer, make_train_step
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import partition

FRAMES, SIZE, BATCH, STEPS = 12, 224, 8, 24
MANY = 9000  # clips whose draws are measured
PAUSE = 3.0  # seconds, after which an earlier reader has read all it reads ahead
SMALL = ClipConfig(SIZE, 32, 256, 4, 4, 256, 4, 4, 128)
METHOD = MethodConfig(frames=FRAMES)
Batches = Iterator[Any]


def records(folder: str, count: int) -> Split:
    clips = []
    for i in range(count):
        path = os.path.join(folder, f"{i}.mp4")
        make_clip(path, i)
        clips.append(VideoClip(str(i), path, (f"a texture, number {i}, drifts over the screen",)))
    options = WriteOptions(isolated=False)
    return pack({"train": clips}, f"{folder}/records", Preprocessing(), options=options).splits[
        "train"
    ]


def tokenized(split: Split, slots: int) -> TokenizedCaptions:
    """The split's captions as a run keeps them, T = `slots`."""
    captions = [caption for captions in split.captions for caption in captions]
    return TokenizedCaptions(captions, CaptionTokenizer(slots)(captions))


def reader(split: Split, threads: int, **options: Any) -> Batches:
    tokenize = tokenized(split, METHOD.text_slots(SMALL))
    spec = BatchSpec(BATCH, SIZE, FRAMES, threads=threads)
    return train_batches(split, tokenize, spec, **options)


def supply(batches: Batches, count: int) -> float:
    """Clips a second."""
    for _ in range(4):  # what was read ahead, and the first epoch of a cache
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - begin)


class Loop:
    """A training loop of a small model that tells how long it waited."""

    def __init__(self) -> None:
        model = TextVideoModel(SMALL, METHOD)
        params = model.init(jax.random.key(0), *model.example())["params"]
        self.mesh = sharding.make_mesh(1)
        optimizer = make_optimizer(base_config().train)
        trainable, frozen = partition(params, METHOD.trainable_patterns(SMALL))
        self.frozen = sharding.place(self.mesh, frozen)
        self.state = sharding.place(self.mesh, TrainState.create(trainable, optimizer))
        self.step = jax.jit(make_train_step(model, optimizer))

    def run(self, batches: Batches, cut: Callable[[Any], Any]) -> tuple[float, float]:
        """(clips a second, share of the time waited); metrics are read every eighth step."""
        state, begin = self.state, 0.0
        waits: list[Callable[[], float]] = []
        with prefetch.IdleTimer() as idle:
            for k in range(-2, STEPS):
                if not k:  # compiled, and what was read ahead meanwhile is used up
                    waits, begin = [], time.perf_counter()
                batch, wait = idle.next(batches)
                waits.append(wait)
                state, metrics = self.step(state, self.frozen, cut(batch))
                idle.step_started(metrics)
                if k % 8 == 7 or k < 0:
                    jax.block_until_ready(metrics)
            elapsed = time.perf_counter() - begin
            return STEPS * BATCH / elapsed, sum(wait() for wait in waits) / elapsed


def cutting_flops(height: int, width: int) -> float:
    """Of one clip."""
    frames = jax.ShapeDtypeStruct((FRAMES, height, width, 3), jnp.uint8)
    crop = jax.ShapeDtypeStruct((9,), jnp.int32)
    return counted_flops(partial(device_cache.crop_frames, image_size=SIZE), frames, crop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        split = records(folder, args.clips)
        shapes = frame_shapes(split, FRAMES, "uniform", args.threads)
        print("\n| batches | clips/s |\n|---|---:|")
        # Shuffling a handful takes longer than shuffling many.
        many = Part(split, "many", [i % len(split) for i in range(MANY)])
        all_shapes = [shapes[i % len(split)] for i in range(MANY)]
        ways: tuple[tuple[str, Split, int, dict[str, Any]], ...] = (
            ("from records", split, 12, {}),
            ("from frames kept in memory, `data.cache_gb`", split, 24, {"cache_gb": 1.0}),
            (
                "draws alone, for frames on the devices",
                many,
                400,
                {"cached_shapes": all_shapes},
            ),
        )
        for name, clips, count, options in ways:
            time.sleep(PAUSE)
            print(f"| {name} | {supply(reader(clips, args.threads, **options), count):,.0f} |")

        loop = Loop()
        layout = device_cache.CacheLayout(loop.mesh, len(split), (FRAMES, *shapes[0], 3))
        stored = decode_clips(split, layout.local_clips, FRAMES, "uniform", args.threads)
        frames = device_cache.fill(layout, stored)
        cache = device_cache.DeviceCache(loop.mesh, frames, SIZE)

        def placed(**options: Any) -> Batches:
            total = itertools.islice(reader(split, args.threads, **options), STEPS + 2)
            return prefetch.prefetch_batches(loop.mesh, total)

        between = (sharding.to_global(loop.mesh, batch) for batch in reader(split, args.threads))
        print("\n| loop | clips/s | waiting |\n|---|---:|---:|")
        for name, batches, cut in (
            ("read between steps", between, lambda batch: batch),
            ("read ahead", placed(), lambda batch: batch),
            ("`data.device_cache_gb`", placed(cached_shapes=shapes), cache.add_frames),
        ):
            time.sleep(PAUSE)
            rate, share = loop.run(batches, cut)
            print(f"| {name} | {rate:.1f} | {100 * share:.1f} % |")

    cutting = cutting_flops(240, 320)
    step = Programs(PRESETS["ViT-B/32"], METHOD, FRAMES, 2).flops_of("step") / 2
    print(f"\ncutting a clip out of 240 x 320: {cutting / 1e9:.2f} GFLOP, its step (vop, ViT-B/32)")
    print(f"{step / 1e9:.1f}: {100 * cutting / step:.2f} %")
    for short, long in ((240, 320), (256, 342)):
        layout = device_cache.CacheLayout(loop.mesh, 9000, (FRAMES, short, long, 3))
        size = layout.bytes_per_device / 1e9
        print(f"9,000 clips of {FRAMES} frames, short side {short}: {size:.1f} GB over all devices")


if __name__ == "__main__":
    main()
