"""Our datasets as scenic's trainers want them: endless iterators of batches, cut for devices."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vop_jax.config.base import validate
from vop_jax.data import load, tokenizer
from vop_jax.data.pipeline import Augmentation, Batch, BatchSpec, eval_videos, train_batches
from vop_jax.data.records.read import Split
from vop_jax.errors import UserError
from vop_jax.experiment.inputs import packed_once
from vop_jax.interop import scenic_config

# Of scenic's text-video projects; in a run of ours the CLIP tells these two.
CROP_SIZE, WORDS = "crop_size", "max_num_words"
NOT_HERE = ("text_buckets", "device_cache_gb")  # a batch has one shape, and lies in memory


def build(
    *,
    batch_size: int,
    eval_batch_size: int,
    num_shards: int | None,
    dtype_str: str = "uint8",
    shuffle_seed: int | None = None,
    rng: Any = None,
    dataset_configs: Mapping[str, Any] | ConfigDict,
    dataset_service_address: str | None = None,
) -> Any:
    """What scenic calls for the dataset "vop_jax"; a `dataset_utils.Dataset`.

    Batches are {"frames": [n, b, F, S, S, 3], "ids": int32 [n, b, T], "batch_mask": float32
    [n, b]}, n the shards, 0 in the mask where a row only fills up. `valid_iter` is there where
    the config has validation: val_split or val_share. In evaluation `ids` is a video's first
    caption; all of them are evaluated by a run of ours.

    Args:
        batch_size, eval_batch_size: of this process.
        num_shards: the leading axis of each array; None: without.
        dtype_str: of the frames. "uint8" as stored, as our models take them; "float32" in
            [0, 1], to be normalised.
        shuffle_seed: of order, crops and captions drawn; None: drawn from `rng`.
        dataset_configs: our section `data`, and crop_size (S, 224), max_num_words (T, 77).

    Raises:
        UserError: a field that is not known or not possible here, or the data are not as said.
    """
    if dataset_service_address:
        raise UserError("dataset_service_address: vop_jax reads its records without tf.data")
    if dtype_str not in ("uint8", "float32"):
        raise UserError(f"config.data_dtype_str={dtype_str!r}: allowed are 'uint8', 'float32'")
    given = dict(dataset_configs)
    size, slots = given.pop(CROP_SIZE, None) or 224, given.pop(WORDS, None) or 77
    data = _data_config(given)
    if shuffle_seed is None:
        shuffle_seed = 0 if rng is None else int(jax.random.randint(rng, (), 0, 2**31 - 1))
    select = "best" if data.val_share or given.get("val_split") else "last"
    packed = packed_once(lambda: load.load(data, "", select=select))
    splits = packed.splits
    train, test = splits[data.train_split], splits[data.eval_split]
    valid = splits[data.val_split] if select == "best" else None
    if warning := load.flip_warning(data, train.captions):
        logging.warning("%s", warning)
    tokenize = tokenizer.CaptionTokenizer(slots)

    def spec(local: int) -> BatchSpec:
        """Batches with `local` rows of each process, in scenic's order: one after the other."""
        first = local * jax.process_index()
        batch_size, rows = local * jax.process_count(), range(first, first + local)
        return BatchSpec(batch_size, size, data.frames, data.sampling, rows, data.threads)

    def shaped(batches: Iterator[Batch]) -> Iterator[Batch]:
        return (_shaped(batch, num_shards, dtype_str) for batch in batches)

    def evaluation(split: Split) -> Iterator[Batch]:
        return shaped(_endless(split, tokenize, spec(eval_batch_size)))

    training = train_batches(
        train,
        tokenize,
        spec(batch_size),
        augmentation=Augmentation(tuple(data.crop_scale), data.flip) if data.augment else None,
        seed=shuffle_seed,
        workers=data.workers,
        cache_gb=data.cache_gb,
    )
    return importlib.import_module("scenic.dataset_lib.dataset_utils").Dataset(
        train_iter=shaped(training),
        valid_iter=evaluation(valid) if valid else None,
        test_iter=evaluation(test),
        meta_data={
            "input_shape": (-1, data.frames, size, size, 3),
            "input_dtype": np.dtype(dtype_str),
            "text_shape": (-1, slots),
            "num_train_examples": len(train),
            "num_eval_examples": len(valid) if valid else 0,
            "num_test_examples": len(test),
            "target_is_onehot": False,
        },
    )


def _data_config(given: Mapping[str, Any]) -> ConfigDict:
    """Our section `data`."""
    keys = scenic_config.dataset_keys(given)
    for key in NOT_HERE:
        if key in keys:
            raise UserError(f"config.dataset_configs.{key}: only runs of vop_jax itself have it")
    if not keys.get("records"):
        raise UserError("config.dataset_configs.records is not set: where packed frames are, or go")
    config = scenic_config.with_values({f"data.{key}": value for key, value in keys.items()})
    validate(config)
    return config.data


def _endless(
    split: Split, tokenize: Callable[[list[str]], np.ndarray], spec: BatchSpec
) -> Iterator[Batch]:
    """`eval_videos` over and over, each with its first caption."""
    first = tokenize([captions[0] for captions in split.captions])
    fill = -len(split) % spec.batch_size
    ids = np.pad(first, ((0, fill), (0, 0))).reshape(-1, spec.batch_size, first.shape[1])
    while True:
        for batch, captions in zip(eval_videos(split, spec), ids, strict=True):
            yield batch | {"ids": captions[list(spec.rows)]}


def _shaped(batch: Batch, shards: int | None, dtype: str) -> Batch:
    """scenic's name for the mask, its dtype and its leading axis."""
    frames, ids = batch["frames"], batch["ids"]
    if dtype == "float32":
        frames = frames.astype(np.float32) / 255
    mask = batch.get("mask", np.ones(len(ids), bool)).astype(np.float32)
    arrays = {"frames": frames, "ids": ids, "batch_mask": mask}
    if shards is None:
        return arrays
    return {name: x.reshape(shards, -1, *x.shape[1:]) for name, x in arrays.items()}
