"""Batches: each a function of seed and step, on any number of threads, workers and hosts."""

import contextlib
import itertools
import os

import grain
import numpy as np
import pytest
from absl import flags

from tests.data import calls
from tests.video import videos
from vop_jax.data import pipeline
from vop_jax.data.clips import VideoClip
from vop_jax.data.pipeline import eval_videos, train_batches
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.tfds_builder import Making
from vop_jax.data.records.write import pack

F, SIZE, CLIPS = 3, 16, 7


def tokenize(captions):
    """The number a caption ends with."""
    return np.array([[int(c.split()[-1]), 0] for c in captions], np.int32)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    clips = []
    for i in range(CLIPS):
        path = videos.write(root / f"{i}.mp4", 8 + i, width=48, height=32)
        clips.append(VideoClip(f"{i}", str(path), tuple(f"caption {10 * i + j}" for j in range(3))))
    preprocessing = Preprocessing(F, stored_fps=10.0, short_side=32)
    making = Making(2, isolated=False, progress=False)
    return pack({"train": clips}, root / "records", preprocessing, making=making).splits["train"]


def batches(split, count, **options):
    options = {"batch_size": 4, "image_size": SIZE, "frames": F, "threads": 2, **options}
    return list(itertools.islice(train_batches(split, tokenize, **options), count))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for key in ("frames", "ids"):
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_promised_form(split):
    for batch in batches(split, 3):
        assert batch["frames"].shape == (4, F, SIZE, SIZE, 3) and batch["frames"].dtype == np.uint8
        assert batch["ids"].shape == (4, 2) and batch["ids"].dtype == np.int32


def test_an_epoch_holds_every_clip_once_in_new_orders(split):
    rows = np.concatenate([b["ids"][:, 0] for b in batches(split, 7)])  # 28 rows, 4 epochs
    epochs = (rows // 10).reshape(4, CLIPS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(CLIPS))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(set(rows)) > CLIPS  # different captions are drawn


def test_any_start_continues_the_same_stream(split):
    whole = batches(split, 6, sampling="rand")
    assert_same(whole[4:], batches(split, 2, sampling="rand", start_step=4))
    assert_same(whole, batches(split, 6, sampling="rand", threads=5))
    other = batches(split, 6, sampling="rand", seed=1)
    assert any((a["ids"] != b["ids"]).any() for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1], [0, 3], [0, 1, 2, 3]])
def test_processes_read_their_rows_of_each_global_batch(split, rows):
    parts = batches(split, 4, local_rows=np.array(rows))
    for whole, part in zip(batches(split, 4), parts, strict=True):
        assert_same([{key: value[rows] for key, value in whole.items()}], [part])
    assert_same(parts[2:], batches(split, 2, local_rows=rows, start_step=2))


def test_captions_are_cut_to_the_bucket_that_holds_the_batch(split):
    def words(captions):
        """The caption's number, its EOT at slot 2, 5 or 8."""
        ids = np.zeros((len(captions), 12), np.int32)
        for row, caption in zip(ids, captions, strict=True):
            number = int(caption.split()[-1])
            row[0], row[2 + 3 * (number % 10)] = number, 1000
        return ids

    def read(**options):
        options = {"batch_size": 2, "image_size": SIZE, "frames": F, "threads": 2, **options}
        return list(itertools.islice(train_batches(split, words, **options), 14))

    widths = set()
    for whole, cut in zip(read(), read(text_buckets=(9, 3)), strict=True):
        needed = whole["ids"].argmax(axis=1).max() + 1
        assert cut["ids"].shape[1] == (3 if needed <= 3 else 9)
        np.testing.assert_array_equal(cut["ids"], whole["ids"][:, : cut["ids"].shape[1]])
        widths.add(cut["ids"].shape[1])
    assert widths == {3, 9}
    assert {b["ids"].shape[1] for b in read(text_buckets=(6,))} == {6, 12}


@pytest.mark.slow
def test_worker_processes_change_nothing(split):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    for workers in (1, 2):
        assert_same(batches(split, 5), batches(split, 5, workers=workers))
        assert_same(batches(split, 5)[2:], batches(split, 3, workers=workers, start_step=2))


@pytest.mark.slow
def test_worker_processes_are_no_part_of_the_parents_group():
    """Whom a terminal's Ctrl-C is for; where they are, it ends them and so the run."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    rows = grain.MapDataset.range(100).map(calls.group)
    with contextlib.closing(pipeline._read(rows, 4, 0, threads=1, workers=1)) as batches:
        assert os.getpgrp() not in next(batches)["group"]


def test_augmentation_is_one_per_clip_and_can_be_off(split):
    plain = batches(split, 3, augment=False)
    again = batches(split, 3, augment=False, seed=0)
    assert_same(plain, again)
    augmented = batches(split, 3)
    assert any((a["frames"] != b["frames"]).any() for a, b in zip(plain, augmented, strict=True))


@pytest.mark.parametrize("options", [{}, {"augment": False}, {"sampling": "rand"}])
def test_kept_frames_change_nothing(split, options):
    assert_same(batches(split, 6, **options), batches(split, 6, cache_gb=1.0, **options))


def test_frames_are_kept_only_where_the_whole_split_fits(split, monkeypatch):
    decoded = []
    decode = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda *a: decoded.append(1) or decode(*a))
    clip = F * 32 * 48 * 3 / 1e9
    for cache_gb, times in ((CLIPS * clip * 1.01, CLIPS), (CLIPS * clip * 0.99, 28)):
        decoded.clear()
        batches(split, 7, cache_gb=cache_gb, threads=1)
        assert times <= len(decoded) < 2 * times  # some are read ahead
    decoded.clear()
    batches(split, 7, cache_gb=1.0, sampling="rand", threads=1)
    assert len(decoded) >= 28  # other frames every time


def test_evaluation_sees_every_clip_once_in_order(split):
    options = {"image_size": SIZE, "frames": F, "threads": 2}
    one_by_one = [b["frames"][0] for b in eval_videos(split, batch_size=1, **options)]
    assert len(one_by_one) == CLIPS
    rows, masks = [], []
    for batch in eval_videos(split, batch_size=4, **options):
        assert batch["frames"].shape == (4, F, SIZE, SIZE, 3)
        rows.append(batch["frames"][batch["mask"]])
        masks.append(batch["mask"])
    np.testing.assert_array_equal(np.concatenate(rows), one_by_one)
    assert np.concatenate(masks).tolist() == [True] * CLIPS + [False]
    for part in ([0, 1], [2, 3], [1, 3]):
        first, second = eval_videos(split, batch_size=4, local_rows=part, **options)
        np.testing.assert_array_equal(first["frames"], [one_by_one[i] for i in part])
        assert second["mask"].tolist() == [4 + i < CLIPS for i in part]
