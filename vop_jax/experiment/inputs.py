"""The two splits of a run: records as batches, captions as ids."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial

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

SpecOf = Callable[[Split], BatchSpec]  # the batches of an evaluation of a split
FEW = 50  # evaluated videos, of which figures say little


@dataclasses.dataclass(frozen=True)
class Plan:
    """The training split on the devices: where clips lie, and (h, w) of the frames of each."""

    split: Split
    layout: device_cache.CacheLayout
    shapes: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Data:
    """The two splits of a run, ready to be read.

    Attributes:
        train_batches: start step -> this process's rows of that batch and all after it.
        learnt_from: a hash of the training split's ids and captions; "" where it is not read.
        text_widths: of their captions, see `tokenizer.bucket_widths`.
        cache: what `train_batches` are cut out of, where frames live on the devices.
        val_set: what a checkpoint is chosen on, if one is.
        num_texts, num_videos: both sides of the evaluation, misses included.
        truncated_captions: how many captions of the splits that are read exceed the slots.
    """

    packed: Records
    eval_set: EvalSet
    val_set: EvalSet | None
    train_batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    learnt_from: str
    text_widths: tuple[int, ...]
    num_texts: int
    num_videos: int
    truncated_captions: int
    cache: Plan | None


def load_data(run: setup.Run, *, training: bool = True) -> Data:
    """Packs the videos once and tokenizes their captions.

    Args:
        training: whether the training split is needed; evaluation does without it.
    """
    config, clip = run.config, run.clip.config
    load_packed = partial(
        load,
        config.data,
        str(run.workdir),
        select=config.train.select,
        training=training or "query_bank" in extra_rows(config),
    )
    if training:
        check_batch(config)
    packed = packed_once(load_packed)
    _check_sizes(run, packed, training)
    hosts.agree({f"split {name!r}": _content(split) for name, split in packed.splits.items()})
    train_split = packed.splits.get(config.data.train_split)
    learnt_from = _digest(train_split) if training and train_split else ""
    _check_continued(run, learnt_from)
    test = packed.splits[config.data.eval_split]
    tokenize = CaptionTokenizer(run.method.text_slots(clip), clip.vocab_size)
    texts = [c for captions in test.captions for c in captions]
    ids, truncated = tokenize.with_truncation(texts)
    in_train = [c for captions in train_split.captions for c in captions] if train_split else []
    train_ids, train_truncated = tokenize.with_truncation(in_train)
    tokenized = TokenizedCaptions(in_train, train_ids)
    missed = test.skipped if config.eval.missing == "miss" else []
    missed_texts = sum(len(clip.captions) for clip in missed)
    train_buckets, train_batch = _train_buckets(run, train_ids), config.train.batch_size
    spec_of = partial(_eval_spec, run)
    cache = plan(run, train_split) if training and train_split else None
    data = Data(
        packed=packed,
        eval_set=EvalSet(
            videos=partial(eval_videos, test, spec_of(test)),
            ids=ids,
            video_of_text=np.repeat(np.arange(len(test)), [len(c) for c in test.captions]),
            contrasts={
                name: tokenize(turned)
                for name, turned in contrasts(config.data.kind, texts).items()
            },
            missed_texts=missed_texts,
            missed_videos=len(missed),
            extra=extra_rows(config),
            bank=_bank(run, packed, tokenize, spec_of),
            text_buckets=_buckets(run),
            fingerprint=_fingerprint(run, packed, test),
        ),
        val_set=_val_set(run, packed, tokenize, spec_of),
        train_batches=lambda first: train_batches(
            packed.splits[config.data.train_split],
            tokenized,
            _batch_spec(run, train_batch),
            augmentation=augmentation_of(config.data),
            seed=config.seed,
            start_step=first,
            workers=config.data.workers,
            cache_gb=config.data.cache_gb,
            text_buckets=train_buckets,
            cached_shapes=cache.shapes if cache else (),
        ),
        learnt_from=learnt_from,
        text_widths=tokenizer.bucket_widths(train_ids, train_buckets, train_batch)
        if in_train
        else (),
        num_texts=len(ids) + missed_texts,
        num_videos=len(test) + len(missed),
        truncated_captions=int(truncated.sum() + train_truncated.sum()),
        cache=cache,
    )
    _report_data(run, data)
    return data


def check_batch(config: ConfigDict) -> None:
    """Raises UserError for a batch that teaches nothing."""
    if config.train.batch_size == 1:
        raise UserError(
            "config.train.batch_size=1: the loss compares the clips of a batch with each other, of "
            "one it is always 0; use 2 or more"
        )


def _check_sizes(run: setup.Run, packed: Records, training: bool) -> None:
    """Raises UserError for splits of which nothing can be learnt or measured."""
    keys = ("train_split", "eval_split") if training else ("eval_split",)
    for key in keys:
        name = run.config.data[key]
        if not len(packed.splits[name]):
            raise UserError(f"config.data.{key}={name!r}: none of its clips can be read")
    if training:
        name = run.config.data.train_split
        split = packed.splits[name]
        captions = {caption for captions in split.captions for caption in captions}
        if len(split) == 1 or len(captions) == 1:
            what = "has one clip" if len(split) == 1 else "has the same caption for all clips"
            raise UserError(
                f"config.data.train_split={name!r}: {what}, and the loss compares clips with each "
                "other's captions: nothing can be learnt from it"
            )


def by_chance(videos: int) -> str:
    """What chance finds among so few videos; "" where they are enough for a figure to mean much."""
    if videos >= FEW:
        return ""
    chance = ", ".join(f"R@{k} {100 * min(1, k / videos):.3g} %" for k in (1, 5, 10))
    return f" (by chance {chance})"


def packed_once(load: Callable[[], Records]) -> Records:
    """What `load` gives: called by the first process, then by the others, who find it packed."""
    first: list[Records] = []
    hosts.on_first(lambda: first.append(load()))
    return hosts.on_all(lambda: first[0] if first else load())


def _check_continued(run: setup.Run, learnt_from: str) -> None:
    """Raises UserError where the workdir's run learnt from another training split."""
    if learnt_from and run.meta.get("learnt_from", learnt_from) != learnt_from:  # older: none
        raise UserError(
            f"--workdir={run.workdir}: holds a run that learnt from other clips or captions than "
            f"this {run.config.data.train_split!r} split's; use another workdir, or that data to "
            "continue it"
        )


def _content(split: Split) -> str:
    return json.dumps([split.ids, split.captions])


def _digest(split: Split) -> str:
    return hashlib.sha256(_content(split).encode()).hexdigest()


def _fingerprint(run: setup.Run, packed: Records, split: Split) -> str:
    """Of all that evaluations of one config may differ in; figures of another are not compared."""
    missed = [(clip.id, clip.captions) for clip in split.skipped]
    facts = [run.clip.fingerprint, _content(split), missed, run.config.eval.missing]
    facts.append(packed.preprocessing)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def augmentation_of(data: ConfigDict) -> Augmentation | None:
    """The random crops of a config's section `data`."""
    return Augmentation(tuple(data.crop_scale), data.flip) if data.augment else None


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


def _eval_spec(run: setup.Run, split: Split) -> BatchSpec:
    """Batches of an evaluation; a few clips are not padded to a whole `eval.batch_size`."""
    return _batch_spec(run, batch_size_for(run.mesh, len(split), run.config.eval.batch_size))


def _val_set(
    run: setup.Run, packed: Records, tokenize: CaptionTokenizer, spec_of: SpecOf
) -> EvalSet | None:
    """What a checkpoint is chosen on, if one is."""
    config = run.config
    if config.train.select != "best" or config.data.val_split not in packed.splits:
        return None
    split = packed.splits[config.data.val_split]
    return EvalSet(
        videos=partial(eval_videos, split, spec_of(split)),
        ids=tokenize([caption for captions in split.captions for caption in captions]),
        video_of_text=np.repeat(np.arange(len(split)), [len(c) for c in split.captions]),
        text_buckets=_buckets(run),
        fingerprint=_fingerprint(run, packed, split),
    )


def _buckets(run: setup.Run) -> tuple[int, ...]:
    """Widths of buckets of captions; none where the last slot has a meaning."""
    return tuple(run.config.data.text_buckets) if run.method.takes_fewer_slots else ()


def _train_buckets(run: setup.Run, ids: np.ndarray) -> tuple[int, ...]:
    """The same; of several processes, which know their own rows alone, one for all batches."""
    widths, batch_size = _buckets(run), run.config.train.batch_size
    if len(sharding.process_rows(run.mesh, batch_size)) == batch_size:
        return widths
    return (tokenizer.fit_bucket(ids, widths).shape[1],)


def _bank(
    run: setup.Run, packed: Records, tokenize: CaptionTokenizer, spec_of: SpecOf
) -> Bank | None:
    """`eval.bank` clips of the training split and the first caption of each, if asked for.

    The first by a hash of their ids, so that they are the same in every run and of the whole
    split; a clip that another split has as well is left out.
    """
    config = run.config
    if "query_bank" not in extra_rows(config):
        return None
    train_split = packed.splits[config.data.train_split]
    others = [split for name, split in packed.splits.items() if name != config.data.train_split]
    elsewhere = {name for split in others for name in split.ids}
    elsewhere |= {clip.id for split in others for clip in split.skipped}
    members = [i for i, name in enumerate(train_split.ids) if name not in elsewhere]
    members.sort(key=lambda i: hash_of(train_split.ids[i]))
    if not members:
        raise UserError(
            f"config.eval.extra='query_bank': all clips of {config.data.train_split!r} are also "
            "in another split, none is left for the bank"
        )
    part = Part(train_split, "bank", members[: config.eval.bank])
    logging.info("query bank: %d clips of %r", len(part), config.data.train_split)
    return Bank(
        videos=partial(eval_videos, part, spec_of(part)),
        ids=tokenize([captions[0] for captions in part.captions]),
    )


def _report_data(run: setup.Run, data: Data) -> None:
    for name, split in data.packed.splits.items():
        captions = sum(len(c) for c in split.captions)
        left_out = f", {len(split.skipped)} videos left out" if split.skipped else ""
        logging.info("%s: %d videos, %d captions%s", name, len(split), captions, left_out)
    for skipped in data.packed.skipped:
        label = label_of(skipped)
        logging.warning("skipped %s (%s): %s", label, skipped["split"], skipped["reason"])
    if data.learnt_from:
        learnt = data.packed.splits[run.config.data.train_split].captions
        if warning := flip_warning(run.config.data, learnt):
            logging.warning("%s", warning)
    if few := by_chance(data.num_videos):
        logging.warning(
            "%r has %d videos%s: figures of so few say little",
            *(run.config.data.eval_split, data.num_videos, few),
        )
    if data.truncated_captions:
        slots = run.method.text_slots(run.clip.config)
        logging.warning(
            "%d captions truncated to %d token slots, EOT kept", data.truncated_captions, slots
        )


KEY = "config.data.device_cache_gb"


def plan(run: setup.Run, split: Split) -> Plan | None:
    """None where the config asks for no cache.

    Raises:
        UserError: it does not fit, or not this run.
    """
    data = run.config.data
    if not data.device_cache_gb:
        return None
    if draws_frames(split, data.frames, data.sampling):
        raise UserError(
            f"{KEY}: data.sampling={data.sampling!r} takes other frames of the stored ones each "
            f"epoch, the devices keep {data.frames} of a clip; set it to 0, or data.stored_fps to 0"
        )
    shapes = hosts.on_all(lambda: frame_shapes(split, data.frames, data.sampling, data.threads))
    hosts.agree({"size of stored frames": json.dumps(shapes)})
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    layout = device_cache.CacheLayout(run.mesh, len(split), (data.frames, height, width, 3))
    hosts.on_all(lambda: layout.check(data.device_cache_gb))
    return Plan(split, layout, shapes)


def filled(run: setup.Run, plan: Plan) -> device_cache.DeviceCache:
    """Decodes the split to the devices, each process what its own hold."""
    data = run.config.data
    clips = decode_clips(
        plan.split, plan.layout.local_clips, data.frames, data.sampling, data.threads
    )
    frames = device_cache.fill(plan.layout, clips)
    gigabytes = plan.layout.bytes_per_device / 1e9
    logging.info("%d clips on the devices, %.3g GB on each", len(plan.split), gigabytes)
    return device_cache.DeviceCache(run.mesh, frames, run.clip.config.image_size)
