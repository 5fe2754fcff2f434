"""Writes shards: files with some clips each. A finished shard is not written again.

A shard depends on its clips and the preprocessing only, whatever machine writes it. Its note,
written last, lists its clips.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import array_record.python.array_record_module as array_record
from absl import logging
from etils import epath

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.records.encode import Encoded, Preprocessing
from vop_jax.data.records.example import serialize
from vop_jax.data.records.layout import (
    Row,
    content_of,
    file_state,
    has_changed,
    label_of,
    row_of,
)
from vop_jax.errors import UserError, VideoError
from vop_jax.storage.files import sha256, write_json


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
        """The finished shard's "clips" (their rows), "size", "sha256"; None if unfinished."""
        try:
            note = json.loads(epath.Path(self.path + ".json").read_text())
        except (OSError, ValueError):
            return None
        return note if note["fingerprint"] == self.fingerprint else None


@dataclasses.dataclass(frozen=True)
class PendingShard:
    """A shard to write, or to write again because files of skipped clips have changed.

    Attributes:
        rows: the row of each clip whose stored record stays; None: the clip is to be encoded.
    """

    shard: Shard
    rows: tuple[Row | None, ...]

    @property
    def to_encode(self) -> list[VideoClip]:
        return [clip for clip, row in zip(self.shard.clips, self.rows, strict=True) if row is None]


def plan(
    dataset: Dataset, staging: epath.Path, preprocessing: Preprocessing, clips_per_shard: int
) -> list[Shard]:
    """All shards of a dataset."""
    shards = []
    for split, clips in dataset.items():
        for number, start in enumerate(range(0, len(clips), clips_per_shard)):
            own = tuple(clips[start : start + clips_per_shard])
            content = json.dumps([preprocessing.to_metadata(), content_of(own)])
            path = os.fspath(staging / staged_name(split, number))
            shards.append(Shard(split, path, own, hashlib.sha256(content.encode()).hexdigest()))
    return shards


def staged_name(split: str, number: int) -> str:
    """The file of a shard that waits for the others."""
    return f"{split}-{number:05d}.array_record"


def pending(shards: Iterable[Shard]) -> list[PendingShard]:
    """The shards that are not finished."""
    unfinished = []
    for shard in shards:
        note = shard.note()
        rows = note["clips"] if note else [None] * len(shard.clips)
        stored = tuple(
            None if row is None or has_changed(clip, row) else row
            for clip, row in zip(shard.clips, rows, strict=True)
        )
        if None in stored:
            unfinished.append(PendingShard(shard, stored))
    return unfinished


def write_shard(task: PendingShard, encoded: Iterator[Encoded | VideoError]) -> None:
    """Writes a shard, taking as many results as it has clips to encode.

    Raises:
        OSError: the disk is full; the shard is as it was before.
        UserError: a shard to be written again is damaged.
    """
    path = epath.Path(task.shard.path)
    unfinished = epath.Path(task.shard.path + ".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, size = [], 0
    try:
        with (
            record_writer(unfinished) as write,
            contextlib.closing(_entries(task, encoded)) as all_,
        ):
            for row, record in all_:
                rows.append(row)
                if record is not None:
                    size += len(record)
                    write(record)
        epath.Path(task.shard.path + ".json").unlink(missing_ok=True)  # it describes the old file
        unfinished.replace(path)
        note = {
            "fingerprint": task.shard.fingerprint,
            "clips": rows,
            "bytes": size,
            "size": path.stat().length,
            "sha256": sha256(path),
        }
        write_json(task.shard.path + ".json", note)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _entries(
    task: PendingShard, encoded: Iterator[Encoded | VideoError]
) -> Generator[tuple[Row, bytes | None], None, None]:
    """(row, record) of each clip of a shard; skipped clips have no record."""
    with contextlib.closing(_stored_records(task)) as stored:
        for clip, row in zip(task.shard.clips, task.rows, strict=True):
            if row is not None:
                yield row, None if "skipped" in row else next(stored)
                continue
            result = next(encoded)
            row = row_of(clip, result)
            if isinstance(result, VideoError):
                logging.warning("skipped %s: %s", label_of(row), result)
                yield {**row, "state": file_state(clip.path)}, None
            else:
                yield row, serialize(clip, result)


def _stored_records(task: PendingShard) -> Generator[bytes, None, None]:
    """The records of a shard that is written again; clips to be encoded had none."""
    count = sum(row is not None and "skipped" not in row for row in task.rows)
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
def record_writer(path: epath.Path) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that appends a record to a new file.

    Raises:
        OSError: the disk is full.
    """
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
    """Raises OSError where array_record reports a full disk by a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        full = {"No space left": errno.ENOSPC, "quota exceeded": errno.EDQUOT}
        code = next((code for words, code in full.items() if words in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), os.fspath(path)) from None
