"""Datasets by name: the config's `data` section becomes packed records and captions."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vop_jax.data.clips import Dataset
from vop_jax.data.datasets import shapes
from vop_jax.data.datasets.folder import hash_of, read_folder, video_of
from vop_jax.data.datasets.locate import locate
from vop_jax.data.datasets.registry import BENCHMARKS, check_sizes, read_benchmark
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.read import Packed, Part, find_records, open_records, splits_of
from vop_jax.data.records.tfds_builder import Making
from vop_jax.data.records.write import check_local, pack
from vop_jax.errors import UserError


def _folder(data: ConfigDict, workdir: str, packed: bool) -> Dataset:
    videos = data.videos
    if packed and not (videos and epath.Path(videos).is_dir()):
        videos = os.path.dirname(data.annotations) or "."  # records need their videos no more
    for key, value in (("annotations", data.annotations), ("videos", videos)):
        if not value:
            raise UserError(f"config.data.{key} is not set: data.kind='folder' needs it")
    return read_folder(data.annotations, videos)


def _clips(data: ConfigDict, workdir: str, packed: bool) -> Dataset:
    videos = data.videos or os.path.join(workdir, "videos")
    rendered = shapes.render(videos, train=data.rendered)
    return read_folder(rendered, os.path.dirname(rendered))


def _stills(data: ConfigDict, workdir: str, packed: bool) -> Dataset:
    rendered = shapes.render_stills(data.videos or os.path.join(workdir, "stills"))
    return read_folder(rendered, os.path.dirname(rendered))


# (data, workdir, whether all that is wanted of it is packed) -> clips
SOURCES: dict[str, Callable[[ConfigDict, str, bool], Dataset]] = {
    "folder": _folder,
    "clips": _clips,
    "stills": _stills,
}

# Of datasets whose captions have an opposite: caption -> {what is turned: other caption}.
CONTRASTS: dict[str, Callable[[str], dict[str, str]]] = {"clips": shapes.contrasts}


def contrasts(kind: str, captions: Sequence[str]) -> dict[str, list[str]]:
    """{what is turned: the other caption of each}, {} for datasets without such."""
    if kind not in CONTRASTS:
        return {}
    turned = [CONTRASTS[kind](caption) for caption in captions]
    return {name: [row[name] for row in turned] for name in turned[0]}


# Small sets start sooner without processes; vop_jax.data.prepare is for the others.
IN_A_RUN = Making(isolated=False)


def load(
    data: ConfigDict,
    workdir: str,
    *,
    select: str = "last",
    training: bool = True,
    making: Making = IN_A_RUN,
) -> Packed:
    """The records of a run: packed on the first call, opened on the next.

    Args:
        data: the config's section of that name.
        workdir: where rendered videos and, without `data.records`, the records go.
        select: of the config's section `train`; "best" needs a validation split.
        training: whether the training split is needed at all.
        making: how records are packed that are not there.

    Raises:
        UserError: see `folder.read_folder`, `registry.read_benchmark` and `write.pack`.
    """
    wanted = {data.train_split, data.eval_split} if training else {data.eval_split}
    if training and select == "best" and not data.val_share:
        wanted.add(data.val_split)
    root = data.records or os.path.join(workdir, "records")
    records = find_records(root)
    if records is None:
        check_local(root)  # before anything is rendered
    preprocessing = Preprocessing.from_mapping(data)
    if data.kind == "folder" and not data.annotations and records is not None:
        packed = open_records(root, preprocessing, sorted(wanted), max_skipped=data.max_skipped)
    elif data.kind in BENCHMARKS:
        packed = _benchmark(data, root, preprocessing, sorted(wanted), making)
    else:
        whole = records is not None and wanted <= splits_of(records)
        dataset = SOURCES[data.kind](data, workdir, whole)
        _check_splits(data, wanted, {split: len(clips) for split, clips in dataset.items()})
        packed = pack(
            {split: clips for split, clips in dataset.items() if split in wanted},
            root,
            preprocessing,
            max_skipped=data.max_skipped,
            making=making,
        )
    if training and select == "best" and data.val_share:
        packed.splits[data.train_split], packed.splits[data.val_split] = _held_out(data, packed)
    return packed


def _benchmark(
    data: ConfigDict, root: str, preprocessing: Preprocessing, wanted: list[str], making: Making
) -> Packed:
    """From its records alone, or from the official files as well."""
    sizes = BENCHMARKS[data.kind].sizes
    _check_splits(data, wanted, {split: size.videos or -1 for split, size in sizes.items()})
    shared = {"name": data.kind, "max_skipped": data.max_skipped}
    if not data.annotations:
        packed = open_records(root, preprocessing, wanted, **shared)
        if data.official_sizes:
            counts = {
                name: (len(split.rows), sum(len(row["captions"]) for row in split.rows))
                for name, split in packed.splits.items()
            }
            try:
                check_sizes(data.kind, counts)
            except UserError as error:
                raise UserError(f"{root}: {error}") from None
        return packed
    dataset, notes = read_benchmark(
        data.kind, data.annotations, splits=wanted, official_sizes=data.official_sizes
    )
    if find_records(root) is None:  # afterwards the videos may go
        if not data.videos:
            raise UserError("config.data.videos is not set: there are no records yet")
        for split, clips in dataset.items():
            dataset[split], more = locate(clips, data.videos)
            notes += more
    for note in notes:
        logging.warning("%s", note)
    return pack(dataset, root, preprocessing, making=making, **shared)


def _check_splits(data: ConfigDict, wanted: Collection[str], there: Mapping[str, int]) -> None:
    for key in ("train_split", "eval_split", "val_split"):
        if data[key] in wanted and not there.get(data[key]):
            found = ", ".join(f"{name} ({n})" if n > 0 else name for name, n in there.items())
            hint = "; config.data.val_share holds some of train out" if key == "val_split" else ""
            raise UserError(
                f"config.data.{key}={data[key]!r}: no such split in the annotations; "
                f"found {found}{hint}"
            )


def _held_out(data: ConfigDict, packed: Packed) -> tuple[Part, Part]:
    """(the rest of train, its share `data.val_share`), by a fixed hash of the videos' names."""
    train = packed.splits[data.train_split]
    # Salted: a folder's test split may have been taken from train by the plain hash.
    videos = [
        video_of(row["id"], row["start"], row["end"]) for row in train.rows if "skipped" not in row
    ]
    held = [hash_of(f"val:{name}") < data.val_share for name in videos]
    parts = [
        Part(train, name, [i for i, out in enumerate(held) if out == wanted])
        for name, wanted in ((data.train_split, False), (data.val_split, True))
    ]
    if not all(len(part) for part in parts):
        raise UserError(
            f"config.data.val_share={data.val_share:g} of {len(train)} clips leaves one side empty"
        )
    return parts[0], parts[1]


# What a mirror image makes wrong.
SIDES = re.compile(
    r"\b(?:(?:left|right)(?:most|wards?|hand(?:ed)?)?|(?:anti|counter)?clockwise)\b", re.IGNORECASE
)


def count_sides(captions: Sequence[str]) -> int:
    """How many captions say left, right or clockwise, as whole words in any case."""
    return sum(SIDES.search(caption) is not None for caption in captions)


def flip_warning(data: ConfigDict, captions_of: Iterable[Sequence[str]]) -> str:
    """What to say of training captions with sides where clips are mirrored; "" of no such.

    Args:
        data: the config's section of that name.
        captions_of: those of each clip of `data.train_split`.
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
