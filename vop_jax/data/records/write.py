"""Writes records: encodes clips into shards, then makes a `tfds` dataset of all shards at once."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Generator, Sequence
from typing import Any

from absl import logging
from etils import epath
from tqdm import tqdm

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.records.encode import Encoded, Preprocessing, encode_clip
from vop_jax.data.records.layout import (
    METADATA,
    SHARDS,
    VERSION,
    clip_of,
    find_records,
    fingerprint,
    has_changed,
    index_name,
    read_index,
    read_json,
    shards_of,
    skipped_of,
    staging_folder,
)
from vop_jax.data.records.read import Records, check_share, open_records
from vop_jax.data.records.shards import PendingShard, Shard, pending, plan, staged_name, write_shard
from vop_jax.errors import UserError, VideoError
from vop_jax.storage.files import folder_lock, is_remote, write_atomic, write_json
from vop_jax.video.workers import in_processes, in_threads

OLD = f"{VERSION}.old"  # finished records while others replace them
DONE = "done"  # marks staged shards that the finished records contain
NOTE_KEYS = ("fingerprint", "bytes", "size", "sha256")  # of a shard's note
CLIPS_PER_SHARD = 256  # about 80 MB of 12 frames of 256 pixels


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """How records are written; the result depends on `clips_per_shard` only.

    Attributes:
        workers: clips decoded at once; 0: one for each core.
        isolated: decode in separate processes, so that a decoder may crash or hang.
        seconds: that a clip may take in such a process.
        beam: Apache Beam's pipeline options; None: write on this machine.
    """

    workers: int = 0
    isolated: bool = True
    seconds: float = 300.0
    clips_per_shard: int = CLIPS_PER_SHARD
    beam: Any = None


def pack(
    dataset: Dataset,
    directory: str | os.PathLike,
    preprocessing: Preprocessing,
    *,
    name: str = "folder",
    max_skipped: float = 0.05,
    options: WriteOptions | None = None,
    retry: bool = False,
    wait: bool = True,
) -> Records:
    """Encodes all clips into `directory`, unless it contains these already; opens the records.

    A clip that cannot be used is skipped, and its reason recorded. Records appear completely or
    not at all; an interrupted attempt is continued. Missing splits are added to finished records.

    Args:
        name: of the dataset, see `Source.records_name`.
        max_skipped: share of a split's clips that may be skipped.
        retry: also encode clips that finished records skipped, and whose files have changed.
        wait: for another process that writes these records; else refuse.

    Raises:
        UserError: the folder has records of other clips or with another preprocessing, more
            clips of a split were skipped than `max_skipped` allows, or it is in a bucket, where
            records are read but not written.
        OSError: the disk is full; finished shards are kept for the next attempt.
    """
    root = epath.Path(directory)
    if _is_incomplete(root, dataset, preprocessing, name, retry):
        check_local(root)
        with folder_lock(
            root, "another process is making these records", use="write records in", wait=wait
        ):
            _finish_replacement(root)
            if _is_incomplete(root, dataset, preprocessing, name, retry):
                _Writer(root, name, preprocessing, options or WriteOptions()).write(dataset)
    return open_records(
        root,
        preprocessing,
        list(dataset),
        name=name,
        max_skipped=max_skipped,
        clips={split: fingerprint(clips) for split, clips in dataset.items()},
    )


def check_local(root: str | os.PathLike) -> None:
    """Raises UserError for a bucket, where no records can be written."""
    if is_remote(root):
        records = find_records(root)
        lack = "there are no records" if records is None else "these records lack some clips"
        raise UserError(
            f"{os.fspath(root)}: {lack}, and they are made on a disk only; use a --workdir "
            "there, or set config.data.records to a folder there or to a copy of finished records "
            "in a bucket"
        )


def _is_incomplete(
    root: epath.Path, dataset: Dataset, preprocessing: Preprocessing, name: str, retry: bool
) -> bool:
    """Whether records are to be written; not where `open_records` will refuse them."""
    records = find_records(root)
    if records is None:
        return True
    metadata = read_json(records / METADATA)
    if records.parent.name != name or any(preprocessing.differences(metadata["preprocessing"])):
        return False
    prints = metadata["clips"]
    if any(prints.get(s, fingerprint(c)) != fingerprint(c) for s, c in dataset.items()):
        return False
    return any(
        split not in prints or (retry and any(map(has_changed, clips, read_index(records, split))))
        for split, clips in dataset.items()
    )


class _Writer:
    """Writes the records of one dataset into ROOT/NAME."""

    def __init__(
        self, root: epath.Path, name: str, preprocessing: Preprocessing, options: WriteOptions
    ):
        self.root, self.name = root, name
        self.preprocessing, self.options = preprocessing, options
        self.staging = staging_folder(root, name)

    def write(self, dataset: Dataset) -> None:
        """Writes the missing shards, makes a new dataset of all, then replaces the old one."""
        records = find_records(self.root)
        (self.staging / DONE).unlink(missing_ok=True)
        if records is not None:
            metadata = read_json(records / METADATA)
            if older := self.preprocessing.older_rule(metadata["preprocessing"]):
                raise UserError(f"{self.root}: cannot be added to: {older}, or use another folder")
            dataset = {**self._stage_finished(records), **dataset}
            per_shard = read_json(records / SHARDS)["clips_per_shard"]
            self.options = dataclasses.replace(self.options, clips_per_shard=per_shard)
        shards = plan(dataset, self.staging, self.preprocessing, self.options.clips_per_shard)
        if self.options.beam is None:
            self._write_here(shards)
        else:
            self._write_with_beam(shards)
        folder = self.staging / "dataset"
        if folder.exists():
            folder.rmtree()
        folder.mkdir(parents=True)
        skipped = self._assemble(folder, dataset, shards)
        (self.staging / DONE).touch()
        finished = self.root / self.name / VERSION
        if finished.exists():
            finished.rename(self.root / self.name / OLD)
        folder.rename(finished)
        _finish_replacement(self.root)
        logging.info("%s: %d clips left out", self.root, len(skipped))

    def _stage_finished(self, records: epath.Path) -> Dataset:
        """Makes finished records staged shards again, to add to them; returns their clips."""
        dataset: Dataset = {}
        for split in read_json(records / METADATA)["clips"]:
            rows = read_index(records, split)
            dataset[split] = [clip_of(row) for row in rows]
            remaining = iter(rows)
            for number, shard in enumerate(shards_of(records, split)):
                note = {key: shard[key] for key in NOTE_KEYS}
                note["clips"] = [next(remaining) for _ in range(shard["clips"])]
                path = self.staging / staged_name(split, number)
                if Shard(split, os.fspath(path), (), shard["fingerprint"]).note() is not None:
                    continue  # an interrupted attempt has staged or rewritten it
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                if shard["file"]:
                    _link(os.fspath(records / shard["file"]), path)
                write_json(f"{path}.json", note)
        return dataset

    def _write_here(self, shards: Sequence[Shard]) -> None:
        tasks = pending(shards)
        clips = [clip for task in tasks for clip in task.to_encode]
        total = sum(len(shard.clips) for shard in shards)
        results = encode_clips(clips, self.preprocessing, self.options)
        title, done = f"packing {self.name}", total - len(clips)
        bar = tqdm(results, title, total, initial=done, unit="clip")
        with contextlib.closing(results), bar:
            encoded = iter(bar)
            for task in tasks:
                write_shard(task, encoded)
            next(encoded, None)  # the bar counts a clip when the next one is requested

    def _write_with_beam(self, shards: Sequence[Shard]) -> None:
        """Writes each shard in a worker of a Beam runner, which sees the same folders."""
        import apache_beam as beam

        alone = dataclasses.replace(self.options, workers=1, isolated=True, beam=None)
        with beam.Pipeline(options=self.options.beam) as pipeline:
            _ = (
                pipeline
                | beam.Create(pending(shards))
                | beam.Reshuffle()
                | beam.Map(_write_alone, self.preprocessing, alone)
            )

    def _assemble(
        self, folder: epath.Path, dataset: Dataset, shards: Sequence[Shard]
    ) -> list[dict[str, str]]:
        """Makes a `tfds` dataset of finished shards; returns what it lists of skipped clips.

        Raises:
            UserError: no clip of a split can be used.
        """
        entries: list[dict[str, Any]] = []
        skipped: list[dict[str, str]] = []
        lengths: dict[str, list[int]] = {}  # split -> readable clips of each file
        for split in dataset:
            own = [shard for shard in shards if shard.split == split]
            notes = [note for shard in own if (note := shard.note()) is not None]
            rows = [row for note in notes for row in note["clips"]]
            of_split = [{"split": split} | row for row in skipped_of(rows)]
            check_share(split, len(rows), of_split, max_skipped=1.0)
            counts = [sum("skipped" not in row for row in note["clips"]) for note in notes]
            lengths[split] = [count for count in counts if count]  # of none there is no file
            numbers, total = itertools.count(), len(lengths[split])
            for shard, note, count in zip(own, notes, counts, strict=True):
                file = None
                if count:  # the names that `tfds` gives the files of a split
                    file = f"{self.name}-{split}.array_record-{next(numbers):05d}-of-{total:05d}"
                    _link(shard.path, folder / file)
                entry = {"split": split, "file": file, "clips": len(note["clips"])}
                entries.append(entry | {key: note[key] for key in NOTE_KEYS})
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(folder / index_name(split), text.encode("utf-8", "surrogatepass"))
            skipped += of_split
        per_shard = self.options.clips_per_shard
        write_json(folder / SHARDS, {"clips_per_shard": per_shard, "shards": entries})
        metadata = {
            "preprocessing": self.preprocessing.to_metadata(),
            "clips": {split: fingerprint(clips) for split, clips in dataset.items()},
            "skipped": skipped,
        }
        sizes = {s: sum(e["bytes"] for e in entries if e["split"] == s) for s in lengths}
        _write_tfds_metadata(folder, self.name, lengths, sizes, metadata)
        return skipped


def encode_clips(
    clips: Sequence[VideoClip], preprocessing: Preprocessing, options: WriteOptions
) -> Generator[Encoded | VideoError, None, None]:
    """What is stored of each clip, in order, or why it cannot be used."""
    encode = functools.partial(encode_clip, preprocessing=preprocessing)
    workers = options.workers or os.cpu_count() or 1
    if options.isolated and clips:
        return in_processes(encode, clips, workers, seconds=options.seconds)
    return in_threads(encode, clips, workers)


def _write_alone(task: PendingShard, preprocessing: Preprocessing, options: WriteOptions) -> None:
    """Writes a shard, unless an earlier try of the runner has finished it."""
    for unfinished in pending([task.shard]):
        results = encode_clips(unfinished.to_encode, preprocessing, options)
        with contextlib.closing(results):
            write_shard(unfinished, results)


def _write_tfds_metadata(
    folder: epath.Path,
    name: str,
    lengths: dict[str, list[int]],
    sizes: dict[str, int],
    metadata: dict[str, Any],
) -> None:
    """Makes the folder a dataset that `tfds.builder_from_directory` reads."""
    import numpy as np
    import tensorflow_datasets as tfds  # seconds to import, and needed for this alone

    features = {
        "id": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "frames": tfds.features.Sequence(
            tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        ),
        "indices": tfds.features.Sequence(np.int32),
        "timestamps": tfds.features.Sequence(np.float32),
    }
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix="array_record"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=own,
                num_bytes=sizes[split],
                filename_template=template.replace(split=split),
            )
            for split, own in lengths.items()
        ],
        version=VERSION,
        filename_template=template,
        check_data=False,
        description=f"Sampled frames of video clips with captions: {name}.",
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,  # record i is the i-th readable clip
    )


def _finish_replacement(root: epath.Path) -> None:
    """Completes an interrupted replacement of records, and removes what it left."""
    for old in root.glob(f"*/{OLD}"):
        if (old.parent / VERSION).exists():
            old.rmtree()
        else:
            old.rename(old.parent / VERSION)
    for done in root.glob(f"*/{VERSION}.shards/{DONE}"):
        if (done.parent.parent / VERSION).exists() and not (done.parent / "dataset").exists():
            done.parent.rmtree()


def _link(source: str, target: epath.Path) -> None:
    """A second name for a file where the file system has them; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        epath.Path(source).copy(target, overwrite=True)
