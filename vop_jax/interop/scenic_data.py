"""Our datasets for scenic's trainers: endless iterators of batches with an axis for the devices."""

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vop_jax.config.base import validate
from vop_jax.data import load
from vop_jax.data.pipeline import Batch, BatchSpec, eval_videos, train_batches
from vop_jax.data.records.read import Split
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError
from vop_jax.experiment.inputs import augmentation_of, packed_once
from vop_jax.interop import scenic_config

# Fields of scenic's text-video projects; our own runs take both from the CLIP.
CROP_SIZE, WORDS = "crop_size", "max_num_words"
UNSUPPORTED = ("text_buckets", "device_cache_gb")  # batches have one shape and are in host memory


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
    """The `dataset_utils.Dataset` "vop_jax"; scenic calls this.

    Batches are {"frames": [n, b, F, S, S, 3], "ids": int32 [n, b, T], "batch_mask": float32
    [n, b]}, n the shards; the mask is 0 in rows that pad a batch. `valid_iter` is None unless the
    config has val_split or val_share. In evaluation `ids` is the first caption of a video; our own
    runs evaluate all captions.

    Args:
        batch_size, eval_batch_size: of this process.
        num_shards: n, the leading axis of each array; None: no such axis.
        dtype_str: of the frames: "uint8", as our models take them, or "float32" in [0, 1].
        shuffle_seed: of the order, the crops and the choice of captions; None: drawn from `rng`.
        dataset_configs: keys of our section `data`, crop_size (S, 224), max_num_words (T, 77).

    Raises:
        UserError: a field is unknown or not supported here, or the data do not fit it.
    """
    if dataset_service_address:
        raise UserError("dataset_service_address: vop_jax reads its records without tf.data")
    if dtype_str not in ("uint8", "float32"):
        raise UserError(f"config.data_dtype_str={dtype_str!r}: allowed are 'uint8', 'float32'")
    fields = dict(dataset_configs)
    size, slots = fields.pop(CROP_SIZE, None) or 224, fields.pop(WORDS, None) or 77
    data = _data_config(fields)
    if shuffle_seed is None:
        shuffle_seed = 0 if rng is None else int(jax.random.randint(rng, (), 0, 2**31 - 1))
    validates = bool(data.val_share or fields.get("val_split"))
    train, valid, test = _splits(data, validates)
    tokenize = CaptionTokenizer(slots)
    loading = {"seed": shuffle_seed, "workers": data.workers, "cache_gb": data.cache_gb}
    train_spec = _batch_spec(data, batch_size, size)
    loading["augmentation"] = augmentation_of(data)
    training = train_batches(train, tokenize, train_spec, **loading)
    eval_spec = _batch_spec(data, eval_batch_size, size)
    convert = functools.partial(_as_scenic, shards=num_shards, dtype=dtype_str)
    return importlib.import_module("scenic.dataset_lib.dataset_utils").Dataset(
        train_iter=map(convert, training),
        valid_iter=map(convert, _repeat(valid, tokenize, eval_spec)) if valid else None,
        test_iter=map(convert, _repeat(test, tokenize, eval_spec)),
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


def _data_config(fields: Mapping[str, Any]) -> ConfigDict:
    """Our section `data`."""
    keys = scenic_config.dataset_keys(fields)
    for key in UNSUPPORTED:
        if key in keys:
            raise UserError(f"config.dataset_configs.{key}: only runs of vop_jax itself have it")
    if not keys.get("records"):
        raise UserError("config.dataset_configs.records: must be the folder of packed frames")
    config = scenic_config.with_values({f"data.{key}": value for key, value in keys.items()})
    validate(config)
    return config.data


def _splits(data: ConfigDict, validates: bool) -> tuple[Split, Split | None, Split]:
    """The splits for training, validation (None without it) and test."""
    select = "best" if validates else "last"
    splits = packed_once(lambda: load.load(data, "", select=select)).splits
    train = splits[data.train_split]
    if warning := load.flip_warning(data, train.captions):
        logging.warning("%s", warning)
    return train, splits[data.val_split] if validates else None, splits[data.eval_split]


def _batch_spec(data: ConfigDict, rows: int, size: int) -> BatchSpec:
    """Batches with `rows` rows of each process, in scenic's order: one process after the other."""
    first = rows * jax.process_index()
    own = range(first, first + rows)
    batch_size = rows * jax.process_count()
    return BatchSpec(batch_size, size, data.frames, data.sampling, own, data.threads)


def _repeat(split: Split, tokenize: CaptionTokenizer, spec: BatchSpec) -> Iterator[Batch]:
    """Endless passes of `eval_videos`, each video with its first caption."""
    first = tokenize([captions[0] for captions in split.captions])
    padding = -len(split) % spec.batch_size
    ids = np.pad(first, ((0, padding), (0, 0))).reshape(-1, spec.batch_size, first.shape[1])
    while True:
        for batch, captions in zip(eval_videos(split, spec), ids, strict=True):
            yield batch | {"ids": captions[list(spec.rows)]}


def _as_scenic(batch: Batch, shards: int | None, dtype: str) -> Batch:
    """A batch with scenic's mask, dtype and leading axis."""
    frames, ids = batch["frames"], batch["ids"]
    if dtype == "float32":
        frames = frames.astype(np.float32) / 255
    mask = batch.get("mask", np.ones(len(ids), bool)).astype(np.float32)
    arrays = {"frames": frames, "ids": ids, "batch_mask": mask}
    if shards is None:
        return arrays
    return {name: x.reshape(shards, -1, *x.shape[1:]) for name, x in arrays.items()}
