"""Records become batches, read ahead by `grain`.

Batch k of training is a function of the seed and k alone: a run continues at step k by starting
at batch k, with any number of threads, workers or hosts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from vop_jax.data import tokenizer
from vop_jax.data.records.read import Split, decode_frames, draws_frames
from vop_jax.video.crops import apply_crop, centre_crop, draw_crop, eval_crop
from vop_jax.video.workers import block_interrupts, leave_process_group

Batch = dict[str, np.ndarray]
Tokenize = Callable[[Sequence[str]], np.ndarray]  # N captions -> int32 [N, T]
PREFETCH = 4  # batches
_ENDLESS = 2**62  # rows


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The form of batches, and this process's part of them.

    Attributes:
        batch_size: B, of all processes together.
        image_size: S.
        frames: F.
        sampling: of the stored frames, see `sampling.sample_indices`.
        local_rows: b positions in a global batch that this process reads; None: all.
        threads: that read and decode, in this process or in each worker.
    """

    batch_size: int
    image_size: int
    frames: int
    sampling: str = "uniform"
    local_rows: Sequence[int] | None = None
    threads: int = 16

    @property
    def rows(self) -> tuple[int, ...]:
        """The b positions."""
        rows = range(self.batch_size) if self.local_rows is None else self.local_rows
        return tuple(map(int, rows))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random crops in training: range of their area as a share of the frame's, and mirroring."""

    scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True


def train_batches(
    split: Split,
    tokenize: Tokenize,
    spec: BatchSpec,
    *,
    augmentation: Augmentation | None = Augmentation(),
    seed: int = 0,
    start_step: int = 0,
    workers: int = 0,
    cache_gb: float = 0.0,
    text_buckets: Sequence[int] = (),
    cached_shapes: Sequence[tuple[int, int]] = (),
) -> Iterator[Batch]:
    """This process's rows of the global batches `start_step`, `start_step + 1`, …, without end.

    An epoch holds every clip once, in a new order, with one of its captions drawn.

    Args:
        augmentation: None: centre crops.
        workers: reader processes; 0: threads of this process read.
        cache_gb: decoded frames stay in memory if those of the whole split take at most this.
        text_buckets: widths of captions, see `tokenizer.fit_bucket`. Processes that read different
            rows need equal widths: pass them one bucket that holds all captions of the split.
        cached_shapes: (h, w) of each clip's frames, if a `DeviceCache` holds them.

    Yields:
        {"frames": uint8 [b, F, S, S, 3], "ids": int32 [b, T]}, T a bucket or all slots. With
        `cached_shapes`, {"clip": int32 [b], "crop": int32 [b, 9]} in place of frames.
    """
    import grain  # slow to import, and it brings jax

    if len(split) < spec.batch_size:
        logging.warning(
            "a batch of %d over %d clips: repeated clips count as each other's negatives",
            spec.batch_size,
            len(split),
        )
    decoder = _Decoder(split, spec, cache_gb * 1e9)
    item = _TrainItem(split.captions, tokenize, spec, augmentation, decoder, cached_shapes)
    stream = grain.MapDataset.source(range(len(split))).seed(seed).shuffle().repeat()
    # Random draws are bound to the global position before processes share the rows out.
    stream = stream.random_map(item)
    rows = grain.MapDataset.range(_ENDLESS).map(_LocalRow(stream, spec.batch_size, spec.rows))
    # Drawing crops takes microseconds of Python: more threads would wait for each other.
    threads = 1 if cached_shapes else spec.threads
    batches = _read_ahead(rows, len(spec.rows), start_step, threads, workers)
    return (batch | {"ids": tokenizer.fit_bucket(batch["ids"], text_buckets)} for batch in batches)


def eval_videos(split: Split, spec: BatchSpec) -> Iterator[Batch]:
    """This process's rows of one pass over a split, in its order, all batches of one size.

    Yields:
        {"frames": uint8 [b, F, S, S, 3], "mask": bool [b], False in rows that pad the last batch}.
    """
    import grain

    batches = -(-len(split) // spec.batch_size)
    rows = [batch * spec.batch_size + row for batch in range(batches) for row in spec.rows]
    items = grain.MapDataset.source(rows).map(_EvalItem(split, spec))
    return _read_ahead(items, len(spec.rows), 0, spec.threads, workers=0)


class _Decoder:
    """Clip i of a split -> its F frames, uint8 [h, w, 3] each.

    Frames stay in memory if those of the whole split fit: decoding the JPEGs of a small split
    once takes a fifth off the demo's time.
    """

    def __init__(self, split: Split, spec: BatchSpec, cache_bytes: float):
        self._split, self._spec = split, spec
        self._random = draws_frames(split, spec.frames, spec.sampling)
        self._cache_bytes = 0 if self._random else cache_bytes
        self._cache: dict[int, list[np.ndarray]] = {}

    def __call__(self, index: int, rng: np.random.Generator) -> list[np.ndarray]:
        if index in self._cache:
            return self._cache[index]
        draw = rng if self._random else None
        pixels = decode_frames(self._split[index], self._spec.frames, self._spec.sampling, draw)
        if sum(frame.nbytes for frame in pixels) * len(self._split) <= self._cache_bytes:
            self._cache[index] = pixels
        return pixels


@dataclasses.dataclass(frozen=True)
class _TrainItem:
    """Clip i of a split -> one of its captions, and its cropped frames or the crop alone."""

    captions: Sequence[Sequence[str]]
    tokenize: Tokenize
    spec: BatchSpec
    augmentation: Augmentation | None
    decode: _Decoder
    cached_shapes: Sequence[tuple[int, int]]

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        captions, size = self.captions[index], self.spec.image_size
        augmentation = self.augmentation
        caption = captions[int(rng.integers(len(captions)))]
        item = {"ids": self.tokenize([caption])[0]}
        pixels = [] if self.cached_shapes else self.decode(index, rng)
        shape = pixels[0].shape[:2] if pixels else self.cached_shapes[index]
        if augmentation:
            crop = draw_crop(shape, size, rng, scale=augmentation.scale, flip=augmentation.flip)
        else:
            crop = centre_crop(shape, size)
        if not pixels:
            return item | {"clip": np.array(index, np.int32), "crop": crop.numbers()}
        # The frames of a clip may differ in size; then each has a centre of its own.
        cropped = apply_crop(pixels, size, crop) if augmentation else eval_crop(pixels, size)
        return item | {"frames": cropped}


@dataclasses.dataclass(frozen=True)
class _EvalItem:
    """Row i of the padded split -> its frames; `mask` is False after the last clip."""

    split: Split
    spec: BatchSpec

    def __call__(self, index: int) -> Batch:
        frames, size = self.spec.frames, self.spec.image_size
        if index >= len(self.split):
            return {"frames": np.zeros((frames, size, size, 3), np.uint8), "mask": np.array(False)}
        pixels = decode_frames(self.split[index], frames, self.spec.sampling, None)
        return {"frames": eval_crop(pixels, size), "mask": np.array(True)}


@dataclasses.dataclass(frozen=True)
class _LocalRow:
    """Row i of this process -> that element of the stream of all rows of all batches."""

    stream: Any
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, index: int) -> Batch:
        batch, row = divmod(index, len(self.rows))
        return self.stream[batch * self.batch_size + self.rows[row]]


def _read_ahead(
    rows: Any, batch_size: int, start: int, threads: int, workers: int
) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, … of a `grain.MapDataset` of rows."""
    import grain

    if workers:  # each takes whole batches, so that their number changes nothing
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH)
        batches = rows.batch(batch_size, drop_remainder=True)[start:].to_iter_dataset(options)
        options = grain.MultiprocessingOptions(num_workers=workers)
        return _start_workers(batches.mp_prefetch(options, worker_init_fn=_init_worker))
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, PREFETCH * batch_size)
    )
    return iter(rows[start * batch_size :].to_iter_dataset(options).batch(batch_size))


def _start_workers(batches: Iterable[Batch]) -> Iterator[Batch]:
    with block_interrupts():
        iterator = iter(batches)
        first = next(iterator)  # grain starts its processes here
    yield first
    yield from iterator


def _init_worker(worker: int, workers: int) -> None:
    leave_process_group()
