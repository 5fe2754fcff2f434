"""Clips become record files, a shard at a time: what is finished stays finished.

A shard is a function of its clips and the preprocessing alone, on whatever machine it is made;
beside each lies a note of what is in it, written last.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import array_record.python.array_record_module as array_record
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.records.encode import Encoded, Preprocessing
from vop_jax.errors import UserError, VideoError
from vop_jax.storage.files import write_json
from vop_jax.video.files import stat

CLIPS_PER_SHARD = 256  # some 80 MB of 12 frames of 256 pixels


def features() -> tfds.features.FeaturesDict:
    """What a record holds."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "frames": tfds.features.Sequence(
                tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            ),
            "indices": tfds.features.Sequence(np.int32),
            "timestamps": tfds.features.Sequence(np.float32),
        }
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some clips of a split, in order, and the file they go to.

    Attributes:
        path: of the records; the note has the suffix `.json`.
        fingerprint: of clips and preprocessing.
    """

    split: str
    path: str
    clips: tuple[VideoClip, ...]
    fingerprint: str

    def note(self) -> dict[str, Any] | None:
        """What is in the shard: a row a clip, and the file's "size"; None unless it was made."""
        try:
            note = json.loads(epath.Path(self.path + ".json").read_text())
        except (OSError, ValueError):
            return None
        return note if note["fingerprint"] == self.fingerprint else None


@dataclasses.dataclass(frozen=True)
class Task:
    """A shard to be made, or made again for clips that were left out and whose files have changed.

    Attributes:
        kept: of each clip the row that stays, with its record; None: it is to be encoded.
    """

    shard: Shard
    kept: tuple[dict[str, Any] | None, ...]

    @property
    def to_encode(self) -> list[VideoClip]:
        return [clip for clip, row in zip(self.shard.clips, self.kept, strict=True) if row is None]


def tasks_of(planned: Iterable[Shard]) -> list[Task]:
    """Those of the shards that are not finished."""
    tasks = []
    for shard in planned:
        note = shard.note()
        rows = note["clips"] if note else [None] * len(shard.clips)
        kept = [
            None if row is None or has_changed(clip, row) else row
            for clip, row in zip(shard.clips, rows, strict=True)
        ]
        if None in kept:
            tasks.append(Task(shard, tuple(kept)))
    return tasks


def plan(
    dataset: Dataset, staging: epath.Path, preprocessing: Preprocessing, per_shard: int
) -> list[Shard]:
    """All shards of a dataset."""
    shards = []
    for split, clips in dataset.items():
        for number, start in enumerate(range(0, len(clips), per_shard)):
            own = tuple(clips[start : start + per_shard])
            asked = json.dumps([preprocessing.described(), content_of(own)])
            path = os.fspath(staging / file_name(split, number))
            shards.append(Shard(split, path, own, hashlib.sha256(asked.encode()).hexdigest()))
    return shards


def file_name(split: str, number: int) -> str:
    """Of a shard while others are made."""
    return f"{split}-{number:05d}.array_record"


def content_of(clips: Sequence[VideoClip]) -> list[list[Any]]:
    """What a split asks for; paths are left out, so that a folder of videos may move."""
    return [[c.id, c.captions, c.start, c.end] for c in clips]


def write_shards(tasks: Iterable[Task], encoded: Iterator[Encoded | VideoError]) -> None:
    """Writes shards, taking as many results as they have clips to encode.

    Raises:
        OSError: the disk is full; this shard is as it was, those before it are finished.
        UserError: a shard to be made again is damaged.
    """
    serialize = _serializer()
    for task in tasks:
        shard = task.shard
        path, unfinished = epath.Path(shard.path), epath.Path(shard.path + ".unfinished")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        size = 0
        try:
            with (
                _record_file(unfinished) as write,
                contextlib.closing(_kept_records(task)) as records,
            ):
                for clip, kept in zip(shard.clips, task.kept, strict=True):
                    if kept is not None:
                        rows.append(kept)
                        if "skipped" not in kept:
                            record = next(records)
                            size += len(record)
                            write(record)
                        continue
                    found = next(encoded)
                    row = row_of(clip, found)
                    if "skipped" in row:
                        logging.warning("skipped %s: %s", label_of(row), found)
                        row["state"] = state_of(clip.path)
                    rows.append(row)
                    if isinstance(found, Encoded):
                        record = serialize(clip, found)
                        size += len(record)
                        write(record)
            epath.Path(shard.path + ".json").unlink(missing_ok=True)  # it tells of another file
            unfinished.replace(path)
            note = {
                "fingerprint": shard.fingerprint,
                "clips": rows,
                "bytes": size,
                "size": path.stat().length,
                "sha256": digest(path),
            }
            write_json(shard.path + ".json", note)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def row_of(clip: VideoClip, found: Encoded | VideoError) -> dict[str, Any]:
    """What an index says of a clip: how it was stored, or why it was "skipped"."""
    row: dict[str, Any] = {"id": clip.id, "path": clip.path, "captions": list(clip.captions)}
    row |= {"start": clip.start, "end": clip.end}
    if isinstance(found, VideoError):
        return {**row, "skipped": str(found), **({"where": clip.where} if clip.where else {})}
    stored, distinct = len(found.jpegs), len(set(found.indices))
    return {**row, "stored": stored, "distinct": distinct, "frames": found.count}


def label_of(row: Mapping[str, Any]) -> str:
    """A clip that was skipped, for people: its line in the annotations, if it has one, its file."""
    path = row["path"] if row["path"].isprintable() else ascii(row["path"])
    return f"{row['where']}: {path}" if "where" in row else path


def has_changed(clip: VideoClip, row: dict[str, Any]) -> bool:
    """Whether the file of a clip that was skipped is another now; one that is gone is not."""
    return "skipped" in row and state_of(clip.path) not in (None, row["state"])


def state_of(path: str) -> list[int] | None:
    """Changes when the file does."""
    try:
        found = stat(path)
    except VideoError:
        return None
    return [found.length, int(found.mtime)]


def digest(path: epath.Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _kept_records(task: Task) -> Generator[bytes, None, None]:
    """The records of a shard that is made again; those to be encoded had none."""
    count = sum(row is not None and "skipped" not in row for row in task.kept)
    if not count:
        return
    damaged = UserError(f"{task.shard.path}: damaged; copy the records again")
    try:
        reader = array_record.ArrayRecordReader(
            task.shard.path, "readahead_buffer_size:0,max_parallelism:0"
        )
        if reader.num_records() != count:
            raise damaged
        for number in range(count):
            yield reader.read([number])[0]
        reader.close()
    except (RuntimeError, IndexError):
        raise damaged from None


@contextlib.contextmanager
def _record_file(path: epath.Path) -> Iterator[Callable[[bytes], None]]:
    with _disk_errors(path):
        writer = array_record.ArrayRecordWriter(os.fspath(path), "group_size:1")

    def write(record: bytes) -> None:
        with _disk_errors(path):
            writer.write(record)

    try:
        yield write
    finally:
        if writer.is_open():
            with _disk_errors(path):
                writer.close()


@contextlib.contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
    """array_record tells of a full disk by a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        full = {"No space left": errno.ENOSPC, "quota exceeded": errno.EDQUOT}
        code = next((code for words, code in full.items() if words in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), os.fspath(path)) from None


def _serializer() -> Callable[[VideoClip, Encoded], bytes]:
    specs = features()
    serializer = tfds.core.example_serializer.ExampleSerializer(specs.get_serialized_info())

    def serialize(clip: VideoClip, encoded: Encoded) -> bytes:
        example = {
            "id": clip.id,
            "captions": list(clip.captions),
            "frames": [io.BytesIO(jpeg) for jpeg in encoded.jpegs],
            "indices": encoded.indices,
            "timestamps": encoded.timestamps,
        }
        # By itself protobuf orders a map differently in each process.
        return serializer.get_tf_example(specs.encode_example(example)).SerializeToString(
            deterministic=True
        )

    return serialize
