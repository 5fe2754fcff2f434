"""Records become batches, with `grain`.

Batch k of training is a function of the seed and k alone: to continue a run at step k is to
start at batch k, with any number of threads, workers or hosts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from vop_jax.data import tokenizer
from vop_jax.data.device_crops import Drawn
from vop_jax.data.records.decoded import decode, draws_frames
from vop_jax.data.records.read import Split
from vop_jax.video.crops import Cut, centre_cut, cut_out, draw_cut, eval_crop
from vop_jax.video.workers import stand_apart, starting

Batch = dict[str, np.ndarray]
Tokenize = Callable[[Sequence[str]], np.ndarray]  # N captions -> int32 [N, T]
PREFETCH = 4  # batches
_ENDLESS = 2**62  # rows


class _Decoder:
    """Clip i of a split -> F frames; kept in memory if those of the whole split fit.

    Small sets are read many times over: decoding their JPEGs once is a fifth of the demo.
    """

    def __init__(self, split: Split, frames: int, sampling: str, cache_bytes: float):
        self._split, self._frames, self._sampling = split, frames, sampling
        self._random = draws_frames(split, frames, sampling)
        self._cache_bytes = 0 if self._random else cache_bytes
        self._kept: dict[int, list[np.ndarray]] = {}

    def __call__(self, index: int, rng: np.random.Generator) -> list[np.ndarray]:
        if index in self._kept:
            return self._kept[index]
        draw = rng if self._random else None
        pixels = decode(self._split[index], self._frames, self._sampling, draw)
        if sum(frame.nbytes for frame in pixels) * len(self._split) <= self._cache_bytes:
            self._kept[index] = pixels
        return pixels


@dataclasses.dataclass(frozen=True)
class _Draw:
    """What is drawn for a clip: one of its captions, then a crop."""

    captions: Sequence[Sequence[str]]
    tokenize: Tokenize
    image_size: int
    scale: tuple[float, float]
    flip: bool
    augment: bool

    def caption(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """int32 [T]."""
        captions = self.captions[index]
        return self.tokenize([captions[int(rng.integers(len(captions)))]])[0]

    def cut(self, shape: Sequence[int], rng: np.random.Generator) -> Cut:
        """Of frames [h, w]."""
        if self.augment:
            return draw_cut(shape, self.image_size, rng, scale=self.scale, flip=self.flip)
        return centre_cut(shape, self.image_size)


@dataclasses.dataclass(frozen=True)
class _TrainItem:
    """Clip i of a split -> its frames and one of its captions."""

    draw: _Draw
    decode: _Decoder

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        ids = self.draw.caption(index, rng)
        pixels = self.decode(index, rng)
        size = self.draw.image_size
        if not self.draw.augment:
            return {"frames": eval_crop(pixels, size), "ids": ids}
        cut = self.draw.cut(pixels[0].shape[:2], rng)
        return {"frames": cut_out(pixels, size, cut), "ids": ids}


@dataclasses.dataclass(frozen=True)
class _DrawnItem:
    """The same draws for frames that are on the devices, in `decoded.Drawn`'s numbers."""

    draw: _Draw
    drawn: Drawn

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        ids = self.draw.caption(index, rng)
        cut = self.draw.cut(self.drawn.shapes[index], rng)
        return self.drawn.numbers(index, cut) | {"ids": ids}


@dataclasses.dataclass(frozen=True)
class _EvalItem:
    """Row i of the padded split -> its frames; `mask` is False behind the last clip."""

    split: Split
    image_size: int
    frames: int
    sampling: str

    def __call__(self, index: int) -> Batch:
        if index >= len(self.split):
            shape = (self.frames, self.image_size, self.image_size, 3)
            return {"frames": np.zeros(shape, np.uint8), "mask": np.array(False)}
        pixels = decode(self.split[index], self.frames, self.sampling, None)
        return {"frames": eval_crop(pixels, self.image_size), "mask": np.array(True)}


@dataclasses.dataclass(frozen=True)
class _Pick:
    """Row i of this process -> that element of the stream of all rows of all batches."""

    stream: Any
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, index: int) -> Batch:
        batch, row = divmod(index, len(self.rows))
        return self.stream[batch * self.batch_size + self.rows[row]]


def train_batches(
    split: Split,
    tokenize: Tokenize,
    *,
    batch_size: int,
    image_size: int,
    frames: int,
    sampling: str = "uniform",
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
    augment: bool = True,
    seed: int = 0,
    start_step: int = 0,
    local_rows: Sequence[int] | None = None,
    threads: int = 16,
    workers: int = 0,
    cache_gb: float = 0.0,
    text_buckets: Sequence[int] = (),
    drawn: Drawn | None = None,
) -> Iterator[Batch]:
    """This process's rows of the global batches `start_step`, `start_step + 1`, …, without end.

    Every clip is seen once an epoch, in a new order each time, with one of its captions drawn.

    Args:
        batch_size: global.
        local_rows: b positions in a global batch, those of the rows that are wanted; None: all.
        image_size: S.
        frames: F.
        sampling: of the stored frames, see `sampling.sample_indices`.
        scale, flip, augment: see `vop_jax.config.base`.
        threads: reading and decoding, in this process or in each worker.
        workers: reader processes; 0: none.
        cache_gb: decoded frames are kept if those of the whole split take no more.
        text_buckets: widths that the captions of a batch are cut to if they fit, see
            `tokenizer.fit_bucket`. Processes that read different rows need the same width: give
            them one that holds all captions of the split.
        drawn: of frames that are on the devices already: batches tell what to cut out of them.

    Yields:
        {"frames": uint8 [b, F, S, S, 3], "ids": int32 [b, T]}, T a bucket or all slots; or,
        instead of frames, what `drawn.numbers` tells of each row.
    """
    import grain  # slow to import, and it brings jax

    if len(split) < batch_size:
        logging.warning(
            "a batch of %d over %d clips: repeated clips count as each other's negatives",
            batch_size,
            len(split),
        )
    draw = _Draw(split.captions, tokenize, image_size, scale, flip, augment)
    item: Any = _DrawnItem(draw, drawn) if drawn else None
    item = item or _TrainItem(draw, _Decoder(split, frames, sampling, cache_gb * 1e9))
    stream = grain.MapDataset.source(range(len(split))).seed(seed).shuffle().repeat()
    # Randomness is bound to the global position before the processes share the rows out.
    stream = stream.random_map(item)
    local = range(batch_size) if local_rows is None else local_rows
    rows = grain.MapDataset.range(_ENDLESS).map(_Pick(stream, batch_size, tuple(local)))
    if drawn:
        threads = 1  # draws are a few microseconds of Python, that more would only wait for
    batches = _read(rows, len(local), start_step, threads, workers)
    return (batch | {"ids": tokenizer.fit_bucket(batch["ids"], text_buckets)} for batch in batches)


def eval_videos(
    split: Split,
    *,
    batch_size: int,
    image_size: int,
    frames: int,
    sampling: str = "uniform",
    local_rows: Sequence[int] | None = None,
    threads: int = 16,
) -> Iterator[Batch]:
    """This process's rows of one pass over a split, in its order, all batches of one size.

    Args: as of `train_batches`.

    Yields:
        {"frames": uint8 [b, F, S, S, 3], "mask": bool [b], False in rows that only fill up}.
    """
    import grain

    local = range(batch_size) if local_rows is None else local_rows
    batches = -(-len(split) // batch_size)
    rows = [k * batch_size + int(row) for k in range(batches) for row in local]
    items = grain.MapDataset.source(rows).map(_EvalItem(split, image_size, frames, sampling))
    return _read(items, len(local), 0, threads, 0)


def _started(batches: Iterable[Batch]) -> Iterator[Batch]:
    with starting():
        rest = iter(batches)
        first = next(rest)  # its processes are started by now
    yield first
    yield from rest


def _stand_apart(worker: int, workers: int) -> None:
    stand_apart()


def _read(rows: Any, batch_size: int, start: int, threads: int, workers: int) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, … of a `grain.MapDataset` of rows, read ahead."""
    import grain

    if workers:  # each takes whole batches, so that their number changes nothing
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH)
        batches = rows.batch(batch_size, drop_remainder=True)[start:].to_iter_dataset(options)
        options = grain.MultiprocessingOptions(num_workers=workers)
        return _started(batches.mp_prefetch(options, worker_init_fn=_stand_apart))
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, PREFETCH * batch_size)
    )
    return iter(rows[start * batch_size :].to_iter_dataset(options).batch(batch_size))
