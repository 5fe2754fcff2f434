"""The config's section `data` becomes packed records and captions."""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from absl import logging
from ml_collections import ConfigDict

from vop_jax.data.datasets import registry
from vop_jax.data.datasets.folder import hash_of, video_of
from vop_jax.data.datasets.source import Source
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.layout import METADATA, find_records, read_json
from vop_jax.data.records.read import Part, Records, open_records
from vop_jax.data.records.write import WriteOptions, check_local, pack
from vop_jax.errors import UserError

# Small sets start sooner without processes; vop_jax.data.prepare is for the others.
IN_A_RUN = WriteOptions(isolated=False)


def contrasts(kind: str, captions: Sequence[str]) -> dict[str, list[str]]:
    """{what is changed: each caption with that changed}, {} for datasets without contrasts."""
    rows = [registry.get(kind).contrasts(caption) for caption in captions]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def load(
    data: ConfigDict,
    workdir: str,
    *,
    select: str = "last",
    training: bool = True,
    options: WriteOptions = IN_A_RUN,
) -> Records:
    """The records of a run: packed by the first call, opened by later ones.

    Args:
        data: the config's section of that name.
        workdir: where rendered videos and, without `data.records`, the records go.
        select: of the config's section `train`; "best" needs a validation split.
        training: whether the training split is needed.
        options: how missing records are written.

    Raises:
        UserError: see `registry.get`, `Source.read` and `write.pack`.
    """
    source = registry.get(data.kind)
    splits = {data.train_split, data.eval_split} if training else {data.eval_split}
    if training and select == "best" and not data.val_share:
        splits.add(data.val_split)
    root = data.records or os.path.join(workdir, "records")
    if find_records(root) is None:
        check_local(root)  # before anything is rendered
    if source.sizes:
        _check_splits(
            data, splits, {name: size.videos or -1 for name, size in source.sizes.items()}
        )
    annotations, videos = source.locations(data, workdir)
    if annotations:
        packed = _from_annotations(data, source, annotations, videos, root, sorted(splits), options)
    else:
        packed = _from_records(data, source, root, sorted(splits))
    if training and select == "best" and data.val_share:
        packed.splits[data.train_split], packed.splits[data.val_split] = _hold_out(data, packed)
    return packed


def _from_records(data: ConfigDict, source: Source, root: str, splits: list[str]) -> Records:
    """From finished records alone."""
    if find_records(root) is None and not source.sizes:
        raise UserError(f"config.data.annotations is not set: data.kind={data.kind!r} needs it")
    packed = open_records(
        root,
        Preprocessing.from_mapping(data),
        splits,
        name=source.records_name,
        max_skipped=data.max_skipped,
    )
    if data.official_sizes:
        counts = {
            name: (len(split.rows), sum(len(row["captions"]) for row in split.rows))
            for name, split in packed.splits.items()
        }
        try:
            source.check_sizes(counts)
        except UserError as error:
            raise UserError(f"{root}: {error}") from None
    return packed


def _from_annotations(
    data: ConfigDict,
    source: Source,
    annotations: str,
    videos: str,
    root: str,
    splits: list[str],
    options: WriteOptions,
) -> Records:
    """From the annotations, and from the videos unless all records are finished."""
    records = find_records(root)
    finished = records is not None and set(splits) <= set(read_json(records / METADATA)["clips"])
    if not finished and not videos:
        raise UserError(
            f"config.data.videos is not set: data.kind={data.kind!r} needs it, because {root} "
            "has no records of these splits"
        )
    dataset, notes = source.read(
        annotations,
        None if finished else videos,
        splits=splits if source.sizes else None,
        official_sizes=data.official_sizes,
    )
    for note in notes:
        logging.warning("%s", note)
    _check_splits(data, splits, {split: len(clips) for split, clips in dataset.items()})
    return pack(
        {split: clips for split, clips in dataset.items() if split in splits},
        root,
        Preprocessing.from_mapping(data),
        name=source.records_name,
        max_skipped=data.max_skipped,
        options=options,
    )


def _check_splits(data: ConfigDict, splits: Collection[str], sizes: Mapping[str, int]) -> None:
    for key in ("train_split", "eval_split", "val_split"):
        if data[key] in splits and not sizes.get(data[key]):
            names = ", ".join(f"{name} ({n})" if n > 0 else name for name, n in sizes.items())
            hint = "; config.data.val_share holds some of train out" if key == "val_split" else ""
            raise UserError(
                f"config.data.{key}={data[key]!r}: no such split in the annotations; "
                f"found {names}{hint}"
            )


def _hold_out(data: ConfigDict, packed: Records) -> tuple[Part, Part]:
    """(the rest of train, its share `data.val_share`), by a fixed hash of the videos' names."""
    train = packed.splits[data.train_split]
    videos = [
        video_of(row["id"], row["start"], row["end"]) for row in train.rows if "skipped" not in row
    ]
    # Salted: a folder's test split may have been taken from train by the plain hash.
    is_val = [hash_of(f"val:{name}") < data.val_share for name in videos]
    rest, val = (
        Part(train, name, [i for i, out in enumerate(is_val) if out == value])
        for name, value in ((data.train_split, False), (data.val_split, True))
    )
    if not len(rest) or not len(val):
        raise UserError(
            f"config.data.val_share={data.val_share:g} of {len(train)} clips leaves one side empty"
        )
    return rest, val


# What a mirror image makes wrong.
SIDES = re.compile(
    r"\b(?:(?:left|right)(?:most|wards?|hand(?:ed)?)?|(?:anti|counter)?clockwise)\b", re.IGNORECASE
)


def count_sides(captions: Sequence[str]) -> int:
    """How many captions say left, right or clockwise, as whole words in any case."""
    return sum(SIDES.search(caption) is not None for caption in captions)


def flip_warning(data: ConfigDict, captions_of: Iterable[Sequence[str]]) -> str:
    """A warning if training mirrors clips whose captions name sides; else "".

    Args:
        data: the config's section of that name.
        captions_of: the captions of each clip of `data.train_split`.
    """
    captions = [caption for own in captions_of for caption in own]
    count = count_sides(captions) if data.augment and data.flip else 0
    if not count:
        return ""
    return (
        f"{data.train_split}: {count:,} of {len(captions):,} captions "
        f"({100 * count / len(captions):.1f} %) say left, right or clockwise, and "
        "config.data.flip=True mirrors half of the clips; where these words are sides, train with "
        "--config.data.flip=False"
    )
