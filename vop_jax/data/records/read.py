"""Opens finished records, and refuses those that do not fit a config."""

import dataclasses
import io
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from PIL import Image
from tqdm import tqdm

from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.example import parse_frames
from vop_jax.data.records.layout import (
    METADATA,
    REMEDY,
    clip_of,
    find_records,
    index_name,
    label_of,
    read_index,
    read_json,
    shards_of,
    staging_folder,
)
from vop_jax.errors import UserError
from vop_jax.storage.files import sha256
from vop_jax.video.sampling import sample_indices
from vop_jax.video.workers import in_threads

T = TypeVar("T")
RANDOM = ("rand", "segments")  # samplings that draw


class _File(NamedTuple):
    """A shard, as array_record takes it; it need not open the file to count its records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Split:
    """The readable clips of a split, in the order of the annotations.

    Indexing gives the stored frames of a clip as a list of JPEG bytes.

    Attributes:
        ids, captions: of each clip.
        skipped: the clips that could not be read.
        rows: the index's row of each clip, skipped ones too.
    """

    def __init__(self, records: epath.Path, name: str):
        shards = shards_of(records, name)
        for shard in shards:
            _check_size(records, shard)
        self.name = name
        self.rows = read_index(records, name)
        readable = [row for row in self.rows if "skipped" not in row]
        self.ids = [row["id"] for row in readable]
        self.captions = [tuple(row["captions"]) for row in readable]
        self.skipped = [clip_of(row) for row in self.rows if "skipped" in row]
        files, rows = [], iter(self.rows)
        for shard in shards:
            count = sum("skipped" not in next(rows) for _ in range(shard["clips"]))
            if shard["file"]:
                files.append(_File(os.fspath(records / shard["file"]), 0, count, count))
        self._source = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> list[bytes]:
        return parse_frames(self._source[index])


class Part(Split):
    """Some readable clips of a split, as a split."""

    def __init__(self, whole: Split, name: str, members: list[int]):
        self._whole, self._members, self.name = whole, members, name
        self.ids = [whole.ids[i] for i in members]
        self.captions = [whole.captions[i] for i in members]
        readable = [row for row in whole.rows if "skipped" not in row]
        self.rows = [readable[i] for i in members]
        self.skipped: list[VideoClip] = []

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> list[bytes]:
        return self._whole[self._members[index]]


@dataclasses.dataclass(frozen=True)
class Records:
    """All splits of a dataset.

    Attributes:
        skipped: "id", "path", "split" and "reason" of each clip that was skipped.
        preprocessing: how the stored frames were made, as `metadata.json` says.
    """

    splits: dict[str, Split]
    skipped: list[dict[str, str]]
    preprocessing: dict[str, Any]


def open_records(
    directory: str | os.PathLike,
    preprocessing: Preprocessing,
    splits: Collection[str],
    *,
    name: str = "folder",
    max_skipped: float = 0.05,
    clips: dict[str, str] | None = None,
) -> Records:
    """Opens finished records.

    Args:
        name: of the dataset, see `Source.records_name`.
        clips: {split: fingerprint} of the clips in the annotations; None: not compared.

    Raises:
        UserError: there are none, they lack a split, or they were made of other clips or with
            another preprocessing.
    """
    root = epath.Path(directory)
    records = find_records(root)
    if records is None:
        begun = " (unfinished: run it again)" if staging_folder(root, name).exists() else ""
        raise UserError(
            f"config.data.records={os.fspath(root)!r}: no records there; make them with "
            f"python -m vop_jax.data.prepare --dataset={name} --videos=… --annotations=… "
            f"--output={os.fspath(root)}{begun}, or set config.data.annotations and "
            "config.data.videos"
        )
    if records.parent.name != name:
        raise UserError(f"{root}: records of {records.parent.name!r}, not of {name!r}; {REMEDY}")
    metadata = read_json(records / METADATA)
    for key, stored, configured in preprocessing.differences(metadata["preprocessing"]):
        raise UserError(
            f"{root}: records were made with data.{key}={stored!r}, not {configured!r}; set "
            f"config.data.{key}={stored!r}, {REMEDY}"
        )
    if older := preprocessing.older_rule(metadata["preprocessing"]):
        logging.warning("%s: %s", root, older)
    skipped = [row for row in metadata["skipped"] if row["split"] in splits]
    opened = Records({}, skipped, metadata["preprocessing"])
    for split in splits:
        fingerprint = metadata["clips"].get(split)
        if fingerprint is None:
            raise UserError(
                f"{root}: no records of split {split!r}; there are {', '.join(metadata['clips'])}"
            )
        if clips is not None and fingerprint != clips[split]:
            raise UserError(
                f"{root}: records of split {split!r} were made of other clips or captions than "
                f"the annotations have now; {REMEDY}"
            )
        opened.splits[split] = Split(records, split)
        of_split = [row for row in skipped if row["split"] == split]
        check_share(split, len(opened.splits[split].rows), of_split, max_skipped)
    return opened


def check_share(
    split: str, count: int, skipped: Sequence[dict[str, str]], max_skipped: float
) -> None:
    """Raises UserError if more than a share of a split's clips, or all of them, were skipped."""
    first = f"{label_of(skipped[0])} ({skipped[0]['reason']})" if skipped else "it is empty"
    if len(skipped) == count:
        raise UserError(f"split {split!r}: none of {count} videos can be used: {first}")
    if len(skipped) > max_skipped * count:
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise UserError(
            f"split {split!r}: {len(skipped)} of {count} videos cannot be used, more than "
            f"config.data.max_skipped={max_skipped:g} allows: {first}{more}"
        )


def _check_size(records: epath.Path, shard: dict[str, Any]) -> None:
    """Raises UserError if a file is missing or truncated, as an interrupted copy leaves it."""
    if shard["file"]:
        file = records / shard["file"]
        size = file.stat().length if file.exists() else 0
        if size != shard["size"]:
            raise UserError(
                f"{file}: {size:,} of {shard['size']:,} bytes; copy the records again, or "
                "delete their folder to make them again"
            )


def check_content(records: epath.Path, split: str) -> None:
    """Reads all files of a split; raises UserError for one that differs from what was written."""
    for shard in shards_of(records, split):
        if shard["file"] and sha256(records / shard["file"]) != shard["sha256"]:
            raise UserError(f"{records / shard['file']}: damaged; copy the records again")


def stored_frames(
    directory: str | os.PathLike, split: str, ids: Collection[str]
) -> dict[str, list[bytes]]:
    """{id: the stored frames, JPEG} of the clips of these ids that the records have.

    Raises:
        UserError: there are no records of that split.
    """
    records = find_records(directory)
    if records is None or not (records / index_name(split)).exists():
        raise UserError(f"{directory}: no records of split {split!r}")
    opened = Split(records, split)
    return {name: opened[i] for i, name in enumerate(opened.ids) if name in ids}


def draws_frames(split: Split, frames: int, sampling: str) -> bool:
    """Whether each epoch takes other frames: where more than F are stored, and drawn."""
    return sampling in RANDOM and any(row.get("stored", 0) > frames for row in split.rows)


def decode_frames(
    stored: list[bytes], frames: int, sampling: str, rng: np.random.Generator | None = None
) -> list[np.ndarray]:
    """F of the stored JPEGs: uint8 [h, w, 3] each."""
    chosen = _sample(stored, frames, sampling, rng)
    pixels = {int(i): np.asarray(Image.open(io.BytesIO(stored[i]))) for i in set(chosen)}
    return [pixels[int(i)] for i in chosen]


def _sample(
    stored: list[bytes], frames: int, sampling: str, rng: np.random.Generator | None = None
) -> np.ndarray:
    if len(stored) == frames:  # they were sampled when they were stored
        return np.arange(frames)
    return sample_indices(len(stored), frames, sampling, rng)


def decode_clips(
    split: Split, members: Sequence[int], frames: int, sampling: str, threads: int
) -> Iterator[np.ndarray]:
    """uint8 [F, h, w, 3] of each of these clips, in order; with a progress bar."""

    def decode(index: int) -> np.ndarray:
        return np.stack(decode_frames(split[index], frames, sampling))

    clips = in_threads(decode, members, threads)
    yield from _progress(clips, "frames to the devices", len(members))


def frame_shapes(split: Split, frames: int, sampling: str, threads: int) -> list[tuple[int, int]]:
    """(h, w) of each clip; reads all records, decodes none.

    Raises:
        UserError: the frames of a clip have several sizes.
    """

    def shape(index: int) -> tuple[int, int]:
        stored = split[index]
        sizes = {Image.open(io.BytesIO(stored[i])).size for i in _sample(stored, frames, sampling)}
        if len(sizes) > 1:
            raise UserError(
                f"config.data.device_cache_gb: the frames of {split.ids[index]!r} have several "
                "sizes; set it to 0 to read from the records"
            )
        width, height = sizes.pop()
        return height, width

    shapes = in_threads(shape, range(len(split)), threads)
    return list(_progress(shapes, "sizes of frames", len(split)))


def _progress(clips: Iterator[T], title: str, count: int) -> Iterator[T]:
    """Shows a bar where the process logs: of several, the first alone."""
    return iter(tqdm(clips, title, count, unit="clip", disable=not logging.level_info()))
