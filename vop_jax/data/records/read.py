"""Finished records: found, opened, and refused where they are not what is asked."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import RULE, Preprocessing
from vop_jax.data.records.layout import (
    SHARDS,
    VERSION,
    index_name,
    read_index,
    staging_of,
)
from vop_jax.data.records.shards import digest
from vop_jax.data.records.tfds_builder import check_share
from vop_jax.errors import UserError
from vop_jax.video.sampling import OLDER_RULE, UNIFORM_RULE

REMEDY = "use another config.data.records, or delete that folder to make them again"


class Split:
    """The readable clips of a split, in the order of the annotations.

    Indexing gives the stored frames of a clip as a list of JPEG bytes.

    Attributes:
        ids, captions: of each clip.
        skipped: the clips that could not be read.
        rows: of all clips, what the index says of them.
    """

    def __init__(self, records: epath.Path, name: str):
        _check_whole(records, name)
        self.rows = read_index(records, name)
        kept = [row for row in self.rows if "skipped" not in row]
        self.name = name
        self.ids = [row["id"] for row in kept]
        self.captions = [tuple(row["captions"]) for row in kept]
        self.skipped = [
            VideoClip(row["id"], row["path"], tuple(row["captions"]))
            for row in self.rows
            if "skipped" in row
        ]
        builder = tfds.builder_from_directory(os.fspath(records))
        self._source = builder.as_data_source(name, decoders={"frames": _AsStored()})
        if len(self._source) != len(kept):
            raise UserError(
                f"{records}: split {name!r} holds {len(self._source)} records, not {len(kept)}; "
                "delete the folder to make them again"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> list[bytes]:
        return list(self._source[index]["frames"])


class Part(Split):
    """Some readable clips of a split, as a split."""

    def __init__(self, whole: Split, name: str, members: list[int]):
        self._whole, self._members, self.name = whole, members, name
        self.ids = [whole.ids[i] for i in members]
        self.captions = [whole.captions[i] for i in members]
        kept = [row for row in whole.rows if "skipped" not in row]
        self.rows = [kept[i] for i in members]
        self.skipped: list[VideoClip] = []

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> list[bytes]:
        return self._whole[self._members[index]]


@dataclasses.dataclass(frozen=True)
class Packed:
    """All splits of a dataset.

    Attributes:
        skipped: of each clip that was skipped: id, path, split, reason.
        preprocessing: how the stored frames were made, as the records say it.
    """

    splits: dict[str, Split]
    skipped: list[dict[str, str]]
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)


def _check_whole(records: epath.Path, split: str) -> None:
    """Raises UserError if files are missing or cut off, as a copy that broke off leaves them."""
    for made in json.loads((records / SHARDS).read_text())["shards"]:
        if made["split"] == split and made["file"]:
            file = records / made["file"]
            found = file.stat().length if file.exists() else 0
            if found != made["size"]:
                raise UserError(
                    f"{file}: {found:,} of {made['size']:,} bytes; copy the records again, or "
                    "delete their folder to make them again"
                )


def check_content(records: epath.Path, split: str) -> None:
    """Reads all of a split; raises UserError for the first file that is not as it was written."""
    for made in json.loads((records / SHARDS).read_text())["shards"]:
        if made["split"] != split or not made["file"]:
            continue
        if digest(records / made["file"]) != made["sha256"]:
            raise UserError(f"{records / made['file']}: damaged; copy the records again")


def find_records(directory: str | os.PathLike) -> epath.Path | None:
    """The folder of the finished records in `directory`, if any.

    Raises:
        UserError: they are of another version of this program.
    """
    root = epath.Path(directory)
    ours = VERSION.split(".")[0]
    for info in (*sorted(root.glob("*/*/dataset_info.json")), root / "dataset_info.json"):
        version = os.path.basename(os.path.abspath(info.parent))
        if not info.exists():
            continue
        if not version.replace(".", "").isdigit():
            continue  # an unfinished one
        if version.split(".")[0] == ours:
            for name in (info.name, "metadata.json", "features.json", SHARDS):
                try:
                    json.loads((info.parent / name).read_text())
                except (FileNotFoundError, ValueError) as error:
                    what = "damaged" if isinstance(error, ValueError) else "not there"
                    file = info.parent / name
                    raise UserError(f"{file}: {what}; copy the records again") from None
            return info.parent
        newer = int(version.split(".")[0]) > int(ours)
        what = "newer than this vop_jax; update it" if newer else "of an older vop_jax"
        raise UserError(f"{root}: records of version {version}, {what}; or {REMEDY}")
    return None


def splits_of(records: epath.Path) -> set[str]:
    """Those that finished records have."""
    return set(json.loads((records / "metadata.json").read_text())["clips"])


def open_records(
    directory: str | os.PathLike,
    preprocessing: Preprocessing,
    splits: Collection[str],
    *,
    name: str = "folder",
    max_skipped: float = 0.05,
    clips: dict[str, str] | None = None,
) -> Packed:
    """Opens finished records.

    Args:
        clips: what the annotations ask for, {split: fingerprint}; None: whatever is there.

    Raises:
        UserError: there are none, or not of these splits, or made otherwise than asked.
    """
    root = epath.Path(directory)
    records = find_records(root)
    if records is None:
        begun = " (unfinished: run it again)" if staging_of(root, name).exists() else ""
        raise UserError(
            f"config.data.records={os.fspath(root)!r}: no records there; make them with "
            f"python -m vop_jax.data.prepare --dataset={name} --videos=… --annotations=… "
            f"--output={os.fspath(root)}{begun}, or set config.data.annotations and "
            "config.data.videos"
        )
    if records.parent.name != name:
        raise UserError(f"{root}: records of {records.parent.name!r}, not of {name!r}; {REMEDY}")
    made = json.loads((records / "metadata.json").read_text())
    for key, theirs, mine in differences(made["preprocessing"], preprocessing):
        raise UserError(
            f"{root}: records were made with data.{key}={theirs!r}, not {mine!r}; set "
            f"config.data.{key}={theirs!r}, {REMEDY}"
        )
    if older := older_rule(made["preprocessing"], preprocessing):
        logging.warning("%s: %s", root, older)
    skipped = [s for s in made["skipped"] if s["split"] in splits]
    packed = Packed({}, skipped, made["preprocessing"])
    for split in splits:
        if split not in made["clips"]:
            raise UserError(
                f"{root}: no records of split {split!r}; there are {', '.join(made['clips'])}"
            )
        if clips is not None and made["clips"][split] != clips[split]:
            raise UserError(
                f"{root}: records of split {split!r} were made of other clips or captions than "
                f"the annotations have now; {REMEDY}"
            )
        opened = packed.splits[split] = Split(records, split)
        skipped = [s for s in packed.skipped if s["split"] == split]
        check_share(split, len(opened.rows), skipped, max_skipped)
    return packed


def differences(made: dict[str, Any], asked: Preprocessing) -> Iterator[tuple[str, Any, Any]]:
    """(key, made, asked) of all that differ."""
    for key, value in dataclasses.asdict(asked).items():
        if made.get(key) != value and not (key == "sampling" and _stored_by_time(made, asked)):
            yield key, made.get(key), value


def older_rule(made: dict[str, Any], asked: Preprocessing) -> str:
    """What there is to say of records whose frames an older rule chose; else ""."""
    if _stored_by_time(made, asked):
        return (
            "the frames were stored by their times; CLIP4Clip, which data.sampling='linspace' is "
            "for, counts them by a whole rate; delete that folder to make the records again"
        )
    if not asked.needs_rule or made.get(RULE, OLDER_RULE) == UNIFORM_RULE:
        return ""
    return (
        f"the frames were sampled by the older rule {OLDER_RULE}: about half of them are one frame "
        f"later than by the published {UNIFORM_RULE}; delete that folder to make the records again"
    )


def _stored_by_time(made: dict[str, Any], asked: Preprocessing) -> bool:
    """Whether records at a rate are for all samplings, as all were, and CLIP4Clip's is asked."""
    return bool(asked.stored_fps) and (made.get("sampling"), asked.sampling) == (
        "uniform",
        "linspace",
    )


def stored_frames(
    directory: str | os.PathLike, split: str, ids: Collection[str]
) -> dict[str, list[bytes]]:
    """{id: the stored frames, JPEG} of the clips of these ids that the records hold.

    Raises:
        UserError: there are no records of that split.
    """
    records = find_records(directory)
    if records is None or not (records / index_name(split)).exists():
        raise UserError(f"{directory}: no records of split {split!r}")
    opened = Split(records, split)
    return {name: opened[i] for i, name in enumerate(opened.ids) if name in ids}


class _AsStored(tfds.decode.Decoder):
    """Hands out stored bytes; JPEGs are decoded where the frames are chosen."""

    def decode_example(self, example: Any) -> Any:
        return example

    def decode_batch_example_np(self, examples: Any) -> Any:
        return examples
