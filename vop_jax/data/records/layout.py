"""Where a dataset of records keeps what: its index, its shards, and those that are being made."""

import hashlib
import json
import os
from typing import Any

from etils import epath

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.records import shards
from vop_jax.errors import UserError
from vop_jax.storage.files import write_json

VERSION = "2.0.0"  # of the records
SHARDS = "shards.json"  # which file holds which clips


def staging_of(root: epath.Path, name: str) -> epath.Path:
    """Where finished shards wait for the others."""
    return root / name / f"{VERSION}.shards"


def reopen(records: epath.Path, staging: epath.Path) -> Dataset:
    """Makes a finished dataset shards again, for more to be made of it; returns its clips."""
    layout = json.loads((records / SHARDS).read_text())
    names = dict.fromkeys(made["split"] for made in layout["shards"])
    rows = {split: read_index(records, split) for split in names}
    begin = dict.fromkeys(rows, 0)
    for made in layout["shards"]:
        split = made["split"]
        first, begin[split] = begin[split], begin[split] + made["clips"]
        path = staging / shards.file_name(split, first // layout["clips_per_shard"])
        if shards.Shard(split, os.fspath(path), (), made["fingerprint"]).note() is not None:
            continue  # an attempt that was cut off has been here
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if made["file"]:
            link(os.fspath(records / made["file"]), path)
        note = {key: made[key] for key in ("fingerprint", "bytes", "size", "sha256")}
        write_json(f"{path}.json", note | {"clips": rows[split][first : begin[split]]})
    return {
        split: [
            VideoClip(row["id"], row["path"], tuple(row["captions"]), row["start"], row["end"])
            for row in own
        ]
        for split, own in rows.items()
    }


def read_index(records: epath.Path, split: str) -> list[dict[str, Any]]:
    """A row for each clip of a split."""
    text = (records / index_name(split)).read_bytes().decode("utf-8", "surrogatepass")
    try:
        return [json.loads(line) for line in text.split("\n") if line]
    except ValueError:
        raise UserError(f"{records / index_name(split)}: damaged; copy the records again") from None


def index_name(split: str) -> str:
    """The file with a row for each clip of a split, the skipped ones too."""
    return f"clips-{split}.jsonl"


def fingerprint(clips: list[VideoClip]) -> str:
    """Of ids, captions and times."""
    return hashlib.sha256(json.dumps(shards.content_of(clips)).encode()).hexdigest()


def link(source: str, target: epath.Path) -> None:
    """A second name where the file system has them: the staged shard stays until all is done."""
    try:
        os.link(source, target)
    except OSError:
        epath.Path(source).copy(target, overwrite=True)
