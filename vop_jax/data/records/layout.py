"""The files of records: where they are, and what their index says of each clip.

ROOT/NAME/2.0.0/           a `tfds` dataset
    dataset_info.json, features.json   `tfds`'s own
    metadata.json          {"preprocessing", "clips": {split: fingerprint}, "skipped"}
    shards.json            which file contains which clips
    clips-SPLIT.jsonl      the index: a row for each clip, skipped ones too
    NAME-SPLIT.array_record-00000-of-00004
ROOT/NAME/2.0.0.shards/    finished shards of an unfinished attempt
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Encoded
from vop_jax.errors import UserError, VideoError
from vop_jax.video.files import stat

VERSION = "2.0.0"  # of the records
SHARDS = "shards.json"
METADATA = "metadata.json"
REMEDY = "use another config.data.records, or delete that folder to make them again"

Row = dict[str, Any]  # of an index


def staging_folder(root: epath.Path, name: str) -> epath.Path:
    """Where finished shards wait for the others."""
    return root / name / f"{VERSION}.shards"


def find_records(directory: str | os.PathLike) -> epath.Path | None:
    """The folder of the finished records in `directory`, if any.

    Raises:
        UserError: they are damaged, or of another version of this program.
    """
    root = epath.Path(directory)
    major = VERSION.split(".")[0]
    for info in (*sorted(root.glob("*/*/dataset_info.json")), root / "dataset_info.json"):
        version = os.path.basename(os.path.abspath(info.parent))
        if not info.exists() or not version.replace(".", "").isdigit():  # an unfinished attempt
            continue
        if version.split(".")[0] == major:
            for name in (info.name, METADATA, "features.json", SHARDS):
                read_json(info.parent / name)
            return info.parent
        newer = int(version.split(".")[0]) > int(major)
        what = "newer than this vop_jax; update it, or" if newer else "of an older vop_jax;"
        raise UserError(f"{root}: records of version {version}, {what} {REMEDY}")
    return None


def read_json(path: epath.Path) -> Any:
    """The value of a JSON file of finished records.

    Raises:
        UserError: it is missing or damaged, as an interrupted copy leaves it.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        what = "damaged" if isinstance(error, ValueError) else "not there"
        raise UserError(f"{path}: {what}; copy the records again") from None


def shards_of(records: epath.Path, split: str) -> list[dict[str, Any]]:
    """What `shards.json` says of a split: "file" (None: no usable clip), "clips", "size", …"""
    return [shard for shard in read_json(records / SHARDS)["shards"] if shard["split"] == split]


def index_name(split: str) -> str:
    """The file with the index of a split."""
    return f"clips-{split}.jsonl"


def read_index(records: epath.Path, split: str) -> list[Row]:
    """A row for each clip of a split.

    Raises:
        UserError: the index is damaged.
    """
    path = records / index_name(split)
    text = path.read_bytes().decode("utf-8", "surrogatepass")
    try:
        rows = [json.loads(line) for line in text.split("\n") if line]
    except ValueError:
        rows = []
    if len(rows) != sum(shard["clips"] for shard in shards_of(records, split)):
        raise UserError(f"{path}: damaged; copy the records again")
    return rows


def row_of(clip: VideoClip, result: Encoded | VideoError) -> Row:
    """The index's row of a clip: how it was stored, or why it was "skipped"."""
    row: Row = {"id": clip.id, "path": clip.path, "captions": list(clip.captions)}
    row |= {"start": clip.start, "end": clip.end}
    if isinstance(result, VideoError):
        return {**row, "skipped": str(result), **({"where": clip.where} if clip.where else {})}
    stored, distinct = len(result.jpegs), len(set(result.indices))
    return {**row, "stored": stored, "distinct": distinct, "frames": result.count}


def clip_of(row: Row) -> VideoClip:
    """The clip of a row."""
    return VideoClip(row["id"], row["path"], tuple(row["captions"]), row["start"], row["end"])


def skipped_of(rows: Sequence[Row]) -> list[dict[str, str]]:
    """{"reason", "id", "path", maybe "where"} of each row of a skipped clip."""
    return [
        {"reason": row["skipped"]} | {k: row[k] for k in ("id", "path", "where") if k in row}
        for row in rows
        if "skipped" in row
    ]


def label_of(row: Mapping[str, Any]) -> str:
    """A name for a skipped clip: its line in the annotations, if it has one, and its file."""
    path = row["path"] if row["path"].isprintable() else ascii(row["path"])
    return f"{row['where']}: {path}" if "where" in row else path


def has_changed(clip: VideoClip, row: Row) -> bool:
    """Whether the file of a skipped clip is another one now; a missing file is not."""
    return "skipped" in row and file_state(clip.path) not in (None, row["state"])


def file_state(path: str) -> list[int] | None:
    """Size and time of a file, which change when it does; None if it is missing."""
    try:
        status = stat(path)
    except VideoError:
        return None
    return [status.length, int(status.mtime)]


def content_of(clips: Sequence[VideoClip]) -> list[list[Any]]:
    """What a split consists of; without paths, so that a folder of videos may move."""
    return [[c.id, c.captions, c.start, c.end] for c in clips]


def fingerprint(clips: Sequence[VideoClip]) -> str:
    """A hash of ids, captions and times."""
    return hashlib.sha256(json.dumps(content_of(clips)).encode()).hexdigest()
