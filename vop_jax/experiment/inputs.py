"""The data of a run: its splits as batches of frames and token ids."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vop_jax.config.base import extra_rows
from vop_jax.data import tokenizer
from vop_jax.data.datasets.folder import hash_of
from vop_jax.data.load import contrasts, flip_warning, load
from vop_jax.data.pipeline import Augmentation, BatchSpec, eval_videos, train_batches
from vop_jax.data.records.layout import label_of
from vop_jax.data.records.read import (
    Part,
    Records,
    Split,
    decode_clips,
    draws_frames,
    frame_shapes,
)
from vop_jax.data.tokenizer import CaptionTokenizer, TokenizedCaptions
from vop_jax.errors import UserError
from vop_jax.evaluation.evaluate import Bank, EvalSet, batch_size_for
from vop_jax.experiment import setup
from vop_jax.training import device_cache, hosts, sharding

FEW_VIDEOS = 50  # metrics of fewer videos mean little
CACHE_KEY = "config.data.device_cache_gb"


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The training split on the devices: where clips lie, and (h, w) of the frames of each."""

    layout: device_cache.CacheLayout
    shapes: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class TrainSet:
    """The training split.

    Attributes:
        fingerprint: SHA-256 of ids and captions.
        batches: start step -> this process's rows of that batch and all later ones.
        text_widths: of the captions of a batch, see `tokenizer.bucket_widths`.
        truncated_captions: how many captions exceed the token slots.
        cache: if frames live on the devices; batches then hold crops in place of frames.
    """

    split: Split
    fingerprint: str
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    text_widths: tuple[int, ...]
    truncated_captions: int
    cache: CachePlan | None


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        train: None in an evaluation.
        val_set: with `train.select=best`, the split that selects a checkpoint.
        num_texts, num_videos: of the evaluated split, misses included.
        truncated_captions: how many captions of both splits exceed the token slots.
    """

    packed: Records
    train: TrainSet | None
    eval_set: EvalSet
    val_set: EvalSet | None
    num_texts: int
    num_videos: int
    truncated_captions: int


def load_data(run: setup.Run, *, training: bool = True) -> Data:
    """Packs the videos on the first call, and tokenizes their captions.

    Args:
        training: whether the training split is needed; an evaluation reads its own split only.

    Raises:
        UserError: a split is missing, useless or another than that of the workdir's run.
    """
    # ---- Records, equal in all processes.
    config, data = run.config, run.config.data
    needs_train = training or "query_bank" in extra_rows(config)
    select = config.train.select
    packed = packed_once(lambda: load(data, str(run.workdir), select=select, training=needs_train))
    _check_sizes(config, packed, training)
    train_split, test = packed.splits.get(data.train_split), packed.splits[data.eval_split]
    cache = None
    if training and train_split is not None and data.device_cache_gb:
        cache = hosts.on_all(lambda: _plan_cache(run, train_split))
    facts = {f"split {name!r}": _content(split) for name, split in packed.splits.items()}
    hosts.agree(facts | {"size of stored frames": json.dumps(cache.shapes if cache else [])})

    # ---- Captions and batches.
    tokenize = CaptionTokenizer(run.method.text_slots(run.clip.config), run.clip.config.vocab_size)
    train = None
    if training and train_split is not None:
        train = _train_set(run, train_split, tokenize, cache)
    texts = _captions(test)
    truncated = int(tokenize.with_truncation(texts)[1].sum())
    missed = test.skipped if config.eval.missing == "miss" else []
    missed_texts = sum(len(clip.captions) for clip in missed)
    reversed_texts = contrasts(data.kind, texts)
    val_set = None
    if select == "best" and data.val_split in packed.splits:
        val_set = _eval_set(run, packed, packed.splits[data.val_split], tokenize)
    result = Data(
        packed=packed,
        train=train,
        eval_set=_eval_set(
            run,
            packed,
            test,
            tokenize,
            contrasts={name: tokenize(captions) for name, captions in reversed_texts.items()},
            missed_texts=missed_texts,
            missed_videos=len(missed),
            extra=extra_rows(config),
            bank=_bank(run, packed, tokenize),
        ),
        val_set=val_set,
        num_texts=len(texts) + missed_texts,
        num_videos=len(test) + len(missed),
        truncated_captions=truncated + (train.truncated_captions if train else 0),
    )
    _log_data(run, result)
    return result


def packed_once(load: Callable[[], Records]) -> Records:
    """Calls `load` in the first process, which packs, and then in the others."""
    first: list[Records] = []
    hosts.on_first(lambda: first.append(load()))
    return hosts.on_all(lambda: first[0] if first else load())


def _check_sizes(config: ConfigDict, packed: Records, training: bool) -> None:
    """Raises UserError for splits from which nothing can be learned or measured."""
    for key in ("train_split", "eval_split") if training else ("eval_split",):
        name = config.data[key]
        if not len(packed.splits[name]):
            raise UserError(f"config.data.{key}={name!r}: none of its clips can be read")
    if training:
        name = config.data.train_split
        split = packed.splits[name]
        if len(split) == 1 or len(set(_captions(split))) == 1:
            what = "has one clip" if len(split) == 1 else "has the same caption for all clips"
            raise UserError(
                f"config.data.train_split={name!r}: {what}, and the loss compares clips with each "
                "other's captions: nothing can be learnt from it"
            )


def _captions(split: Split) -> list[str]:
    return [caption for captions in split.captions for caption in captions]


def _content(split: Split) -> str:
    return json.dumps([split.ids, split.captions])


# ---- Training


def _train_set(
    run: setup.Run, split: Split, tokenize: CaptionTokenizer, cache: CachePlan | None
) -> TrainSet:
    """The training split; UserError if the workdir's run learned from another one."""
    config, fingerprint = run.config, hashlib.sha256(_content(split).encode()).hexdigest()
    if run.meta.get("learnt_from", fingerprint) != fingerprint:  # older runs have none
        raise UserError(
            f"--workdir={run.workdir}: holds a run that learnt from other clips or captions than "
            f"this {config.data.train_split!r} split's; use another workdir, or that data to "
            "continue it"
        )
    captions = _captions(split)
    ids, truncated = tokenize.with_truncation(captions)
    widths, batch_size = _text_buckets(run), config.train.batch_size
    spec = _batch_spec(run, batch_size)
    if len(spec.rows) < batch_size:  # processes know their own rows only: all need one width
        widths = (tokenizer.fit_bucket(ids, widths).shape[1],)

    def batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        return train_batches(
            split,
            TokenizedCaptions(captions, ids),
            spec,
            augmentation=augmentation_of(config.data),
            seed=config.seed,
            start_step=start_step,
            workers=config.data.workers,
            cache_gb=config.data.cache_gb,
            text_buckets=widths,
            cached_shapes=cache.shapes if cache else (),
        )

    text_widths = tokenizer.bucket_widths(ids, widths, batch_size)
    return TrainSet(split, fingerprint, batches, text_widths, int(truncated.sum()), cache)


def augmentation_of(data: ConfigDict) -> Augmentation | None:
    """The random crops of a config's section `data`."""
    return Augmentation(tuple(data.crop_scale), data.flip) if data.augment else None


def _text_buckets(run: setup.Run) -> tuple[int, ...]:
    """Widths of caption batches; none where the last slot has a meaning."""
    return tuple(run.config.data.text_buckets) if run.method.takes_fewer_slots else ()


def _batch_spec(run: setup.Run, batch_size: int) -> BatchSpec:
    """Global batches of this size, and this process's rows of them."""
    data = run.config.data
    return BatchSpec(
        batch_size=batch_size,
        image_size=run.clip.config.image_size,
        frames=data.frames,
        sampling=data.sampling,
        local_rows=sharding.process_rows(run.mesh, batch_size).tolist(),
        threads=data.threads,
    )


def _plan_cache(run: setup.Run, split: Split) -> CachePlan:
    """Lays the split out on the devices; UserError if it cannot be cached or does not fit."""
    data = run.config.data
    if draws_frames(split, data.frames, data.sampling):
        raise UserError(
            f"{CACHE_KEY}: data.sampling={data.sampling!r} takes other frames of the stored ones "
            f"each epoch, the devices keep {data.frames} of a clip; set it to 0, or "
            "data.stored_fps to 0"
        )
    shapes = frame_shapes(split, data.frames, data.sampling, data.threads)
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    layout = device_cache.CacheLayout(run.mesh, len(split), (data.frames, height, width, 3))
    layout.check(data.device_cache_gb)
    return CachePlan(layout, shapes)


def fill_cache(
    run: setup.Run, split: Split, layout: device_cache.CacheLayout
) -> device_cache.DeviceCache:
    """Decodes the split to the devices; each process decodes the clips of its own devices."""
    data = run.config.data
    clips = decode_clips(split, layout.local_clips, data.frames, data.sampling, data.threads)
    frames = device_cache.fill(layout, clips)
    gigabytes = layout.bytes_per_device / 1e9
    logging.info("%d clips on the devices, %.3g GB on each", len(split), gigabytes)
    return device_cache.DeviceCache(run.mesh, frames, run.clip.config.image_size)


# ---- Evaluation


def _eval_set(
    run: setup.Run, packed: Records, split: Split, tokenize: CaptionTokenizer, **more: Any
) -> EvalSet:
    """A split to evaluate; `more` are further fields of `EvalSet`."""
    # Metrics are comparable if these are equal, and the config is.
    missed = [(clip.id, clip.captions) for clip in split.skipped]
    facts = [run.clip.fingerprint, _content(split), missed, run.config.eval.missing]
    facts.append(packed.preprocessing)
    return EvalSet(
        videos=partial(eval_videos, split, _eval_spec(run, split)),
        ids=tokenize(_captions(split)),
        video_of_text=np.repeat(np.arange(len(split)), [len(c) for c in split.captions]),
        text_buckets=_text_buckets(run),
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
        **more,
    )


def _eval_spec(run: setup.Run, split: Split) -> BatchSpec:
    """Batches of an evaluation; a few clips are not padded to a whole `eval.batch_size`."""
    return _batch_spec(run, batch_size_for(run.mesh, len(split), run.config.eval.batch_size))


def _bank(run: setup.Run, packed: Records, tokenize: CaptionTokenizer) -> Bank | None:
    """For query_bank: `eval.bank` training clips and the first caption of each; else None.

    They are the first by a hash of their ids, so that every run has the same. A clip that is also
    in another split is left out.
    """
    config = run.config
    if "query_bank" not in extra_rows(config):
        return None
    train_split = packed.splits[config.data.train_split]
    others = [split for name, split in packed.splits.items() if name != config.data.train_split]
    shared = {name for split in others for name in split.ids}
    shared |= {clip.id for split in others for clip in split.skipped}
    members = [i for i, name in enumerate(train_split.ids) if name not in shared]
    members.sort(key=lambda i: hash_of(train_split.ids[i]))
    if not members:
        raise UserError(
            f"config.eval.extra='query_bank': all clips of {config.data.train_split!r} are also "
            "in another split, none is left for the bank"
        )
    part = Part(train_split, "bank", members[: config.eval.bank])
    logging.info("query bank: %d clips of %r", len(part), config.data.train_split)
    return Bank(
        videos=partial(eval_videos, part, _eval_spec(run, part)),
        ids=tokenize([captions[0] for captions in part.captions]),
    )


# ---- Log


def by_chance(videos: int) -> str:
    """The recall of a random order of so few videos, in words; "" from `FEW_VIDEOS` on."""
    if videos >= FEW_VIDEOS:
        return ""
    chance = ", ".join(f"R@{k} {100 * min(1, k / videos):.3g} %" for k in (1, 5, 10))
    return f" (by chance {chance})"


def _log_data(run: setup.Run, data: Data) -> None:
    for name, split in data.packed.splits.items():
        left_out = f", {len(split.skipped)} videos left out" if split.skipped else ""
        count = len(_captions(split))
        logging.info("%s: %d videos, %d captions%s", name, len(split), count, left_out)
    for skipped in data.packed.skipped:
        label = label_of(skipped)
        logging.warning("skipped %s (%s): %s", label, skipped["split"], skipped["reason"])
    if data.train and (warning := flip_warning(run.config.data, data.train.split.captions)):
        logging.warning("%s", warning)
    if few := by_chance(data.num_videos):
        split = run.config.data.eval_split
        logging.warning(
            "%r has %d videos%s: metrics of so few mean little", split, data.num_videos, few
        )
    if count := data.truncated_captions:
        slots = run.method.text_slots(run.clip.config)
        logging.warning("%d captions truncated to %d token slots, EOT kept", count, slots)
