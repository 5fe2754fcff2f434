"""Batches: each a function of seed and step, on any number of threads, workers and hosts."""

import contextlib
import functools
import io
import itertools
import os

import grain
import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.data import calls
from vop_jax.data import pipeline
from vop_jax.data.pipeline import Augmentation, BatchSpec, eval_videos, train_batches
from vop_jax.data.tokenizer import fit_bucket
from vop_jax.video.crops import Crop, apply_crop

F, SIZE, CLIPS = 3, 16, 7
HEIGHT, WIDTH = 32, 48


class FakeSplit:
    """Clips of 8 stored frames, each a picture of noise."""

    def __init__(self):
        self.ids = [f"{i}" for i in range(CLIPS)]
        self.captions = [[f"caption {10 * i + j}" for j in range(3)] for i in range(CLIPS)]
        self.rows = [{"stored": 8}] * CLIPS
        self.reads = 0

    def __len__(self):
        return CLIPS

    def __getitem__(self, index):
        self.reads += 1
        return [jpeg(8 * index + frame) for frame in range(8)]


@functools.cache
def jpeg(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def tokenize(captions):
    """The number a caption ends with."""
    return np.array([[int(c.split()[-1]), 0] for c in captions], np.int32)


def spec(batch_size=4, threads=2, **fields):
    return BatchSpec(batch_size, SIZE, F, threads=threads, **fields)


def read(count, batches=None, *, split=None, tokenize=tokenize, **options):
    """The first training batches."""
    stream = train_batches(split or FakeSplit(), tokenize, batches or spec(), **options)
    return list(itertools.islice(stream, count))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_an_epoch_holds_every_clip_once_in_new_orders():
    batches = read(7)  # 28 rows, 4 epochs
    for batch in batches:
        assert batch["frames"].shape == (4, F, SIZE, SIZE, 3) and batch["frames"].dtype == np.uint8
        assert batch["ids"].shape == (4, 2) and batch["ids"].dtype == np.int32
    rows = np.concatenate([batch["ids"][:, 0] for batch in batches])
    epochs = (rows // 10).reshape(4, CLIPS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(CLIPS))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(set(rows)) > CLIPS  # different captions are drawn


def test_batch_k_depends_on_the_seed_and_k_alone():
    random = spec(sampling="rand")
    whole = read(6, random)
    assert_same(whole[4:], read(2, random, start_step=4))
    assert_same(whole, read(6, spec(sampling="rand", threads=5)))
    other = read(6, random, seed=1)
    assert any((a["ids"] != b["ids"]).any() for a, b in zip(whole, other, strict=True))
    # Frames are drawn, crops too, unless the config says otherwise.
    assert any((a["frames"] != b["frames"]).any() for a, b in zip(whole, read(6), strict=True))
    plain = read(3, augmentation=None)
    assert any((a["frames"] != b["frames"]).any() for a, b in zip(plain, read(3), strict=True))
    assert_same(plain, read(3, augmentation=None))


@pytest.mark.parametrize("rows", [[0, 1], [1], [0, 3]])
def test_processes_read_their_rows_of_each_global_batch(rows):
    parts = read(4, spec(local_rows=np.array(rows)))
    for whole, part in zip(read(4), parts, strict=True):
        assert_same([{key: value[rows] for key, value in whole.items()}], [part])
    assert_same(parts[2:], read(2, spec(local_rows=rows), start_step=2))


def test_crops_for_the_device_cache_are_those_of_the_frames():
    split = FakeSplit()
    for augmentation in (Augmentation(), None):
        options = {"split": split, "augmentation": augmentation}
        crops = read(5, cached_shapes=[(HEIGHT, WIDTH)] * CLIPS, **options)
        for batch, numbers in zip(read(5, **options), crops, strict=True):
            np.testing.assert_array_equal(batch["ids"], numbers["ids"])
            for frames, clip, crop in zip(
                batch["frames"], numbers["clip"], numbers["crop"], strict=True
            ):
                crop = Crop(*crop[:-1].tolist(), mirrored=bool(crop[-1]))
                pixels = pipeline.decode_frames(split[int(clip)], F, "uniform")
                np.testing.assert_array_equal(frames, apply_crop(pixels, SIZE, crop))


def test_captions_have_the_bucket_that_holds_the_batch():
    def words(captions):
        """The caption's number, its EOT at slot 2, 5 or 8."""
        ids = np.zeros((len(captions), 12), np.int32)
        for row, caption in zip(ids, captions, strict=True):
            number = int(caption.split()[-1])
            row[0], row[2 + 3 * (number % 10)] = number, 1000
        return ids

    whole = read(14, spec(2), tokenize=words)
    batches = read(14, spec(2), tokenize=words, text_buckets=(9, 3))
    for full, batch in zip(whole, batches, strict=True):
        np.testing.assert_array_equal(batch["ids"], fit_bucket(full["ids"], (3, 9)))
    assert {batch["ids"].shape[1] for batch in batches} == {3, 9}


@pytest.mark.slow
def test_worker_processes_change_nothing_and_have_a_process_group_of_their_own():
    """A terminal's Ctrl-C goes to the parent's group: it would end them, and so the run."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    for workers in (1, 2):
        assert_same(read(5)[2:], read(3, workers=workers, start_step=2))
    rows = grain.MapDataset.range(100).map(calls.group)
    with contextlib.closing(pipeline._read_ahead(rows, 4, 0, threads=1, workers=1)) as batches:
        assert os.getpgrp() not in next(batches)["group"]


def test_frames_stay_in_memory_only_if_the_whole_split_fits():
    clip = F * HEIGHT * WIDTH * 3 / 1e9
    expected = read(7)
    for cache_gb, decoded in ((CLIPS * clip * 1.01, CLIPS), (CLIPS * clip * 0.99, 28)):
        split = FakeSplit()
        assert_same(read(7, spec(threads=1), split=split, cache_gb=cache_gb), expected)
        assert decoded <= split.reads < 2 * decoded  # some are read ahead
    split, random = FakeSplit(), spec(sampling="rand", threads=1)
    assert_same(read(7, random, split=split, cache_gb=1.0), read(7, random))
    assert split.reads >= 28  # other frames every time


def test_evaluation_reads_every_clip_once_in_order():
    split = FakeSplit()
    one_by_one = [batch["frames"][0] for batch in eval_videos(split, spec(1))]
    assert len(one_by_one) == CLIPS
    batches = list(eval_videos(split, spec()))
    assert {batch["frames"].shape for batch in batches} == {(4, F, SIZE, SIZE, 3)}
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert masks.tolist() == [True] * CLIPS + [False]
    frames = np.concatenate([batch["frames"] for batch in batches])
    np.testing.assert_array_equal(frames[masks], one_by_one)
    for rows in ([0, 1], [1, 3]):
        first, second = eval_videos(split, spec(local_rows=rows))
        np.testing.assert_array_equal(first["frames"], [one_by_one[i] for i in rows])
        assert second["mask"].tolist() == [4 + i < CLIPS for i in rows]
