"""Whether a dataset is whole, and what will become of it under a config.

    python -m vop_jax.data.check --config=configs/msrvtt9k.py:vop_f+c --config.data.records=DIR

Reads the packed records; where there are none, decodes all videos to see. Exit status 1 when a
split is not whole or the records do not fit the config.
"""

import collections
import contextlib
import functools
import json
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from vop_jax import cli
from vop_jax.config.base import validate
from vop_jax.config.clip import preset
from vop_jax.data.datasets import registry
from vop_jax.data.load import count_sides, flip_warning
from vop_jax.data.records import layout, read, shards, tfds_builder
from vop_jax.data.records.encode import Preprocessing, encode_clip
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError
from vop_jax.storage import files
from vop_jax.tuning.methods import method_of
from vop_jax.video.workers import in_processes

Rows = list[dict[str, Any]]  # of a split, as in its index


def check(config: ConfigDict) -> dict[str, Any]:
    """What there is to know of a config's dataset.

    Returns:
        {"source", "problems": [str], "splits": {name: counts}}; whole if there are no problems.

    Raises:
        UserError: there are neither records nor annotations, or they cannot be read.
    """
    data = config.data
    preprocessing = Preprocessing.from_mapping(data)
    problems: list[str] = []
    notes: list[str] = []
    needs_val = config.train.select == "best" and not data.val_share
    wanted = ("train_split", "eval_split", *(["val_split"] if needs_val else []))
    records = read.find_records(data.records) if data.records else None
    if records is not None:
        rows = _of_records(records, data, preprocessing, notes, problems, wanted)
    elif data.annotations and data.videos:
        rows = _of_videos(data, preprocessing, notes, problems, wanted)
    else:
        raise UserError(
            f"config.data.records={data.records!r}: no records there; without them "
            "config.data.annotations and config.data.videos are needed"
        )

    slots = method_of(config).text_slots(preset(config, default="ViT-B/32"))
    tokenize = CaptionTokenizer(slots)
    splits = {split: _describe(own, tokenize) for split, own in rows.items()}
    learnt = (row["captions"] for row in rows.get(data.train_split, ()))
    if warning := flip_warning(data, learnt):
        notes.append(warning)
    for split, found in splits.items():
        if found["usable"] < found["videos"]:
            missing, limit = found["videos"] - found["usable"], data.max_skipped
            refused = missing > limit * found["videos"]
            problems.append(
                f"split {split!r}: {missing} of {found['videos']} videos not usable, "
                f"{'more than' if refused else 'within'} config.data.max_skipped={limit:g}: "
                f"a run {'refuses' if refused else 'goes on without them'}"
            )
    if data.official_sizes:
        for split, found in splits.items():
            try:
                registry.get(data.kind).check_sizes({split: (found["videos"], found["captions"])})
            except UserError as error:
                problems.append(str(error))
    return {
        "dataset": data.kind,
        "source": os.fspath(records or data.videos),
        "slots": slots,
        "splits": splits,
        "notes": notes,
        "problems": problems,
    }


def _of_records(
    records: epath.Path,
    data: ConfigDict,
    preprocessing: Preprocessing,
    notes: list[str],
    problems: list[str],
    wanted: Sequence[str],
) -> dict[str, Rows]:
    made = json.loads((records / "metadata.json").read_text())
    name = registry.get(data.kind).records_name
    if records.parent.name != name:
        raise UserError(f"{data.records}: records of {records.parent.name!r}, not of {name!r}")
    for key, theirs, mine in read.differences(made["preprocessing"], preprocessing):
        problems.append(f"records were made with data.{key}={theirs!r}, the config says {mine!r}")
    if older := read.older_rule(made["preprocessing"], preprocessing):
        notes.append(f"{data.records}: {older}")
    if data.annotations:
        dataset, _ = registry.get(data.kind).read(
            data.annotations,
            None,  # records need their videos no more
            official_sizes=data.official_sizes,
            splits=list(made["clips"]),
        )
        for split, clips in dataset.items():
            if layout.fingerprint(clips) != made["clips"][split]:
                problems.append(f"split {split!r}: the annotations have other clips or captions")
    rows = {}
    for split in made["clips"]:
        try:
            rows[split] = read.Split(records, split).rows
            read.check_content(records, split)
        except UserError as error:
            problems.append(str(error))
    _check_splits(data, wanted, made["clips"], problems)
    return rows


def _check_splits(
    data: ConfigDict, wanted: Sequence[str], there: Collection[str], problems: list[str]
) -> None:
    for key in wanted:
        if data[key] not in there:
            found = ", ".join(there)
            problems.append(f"config.data.{key}={data[key]!r}: no such split; found {found}")


def _of_videos(
    data: ConfigDict,
    preprocessing: Preprocessing,
    notes: list[str],
    problems: list[str],
    wanted: Sequence[str],
) -> dict[str, Rows]:
    dataset, noticed = registry.get(data.kind).read(
        data.annotations, data.videos, official_sizes=data.official_sizes
    )
    notes += noticed
    _check_splits(data, wanted, dataset, problems)
    encode = functools.partial(encode_clip, preprocessing=preprocessing)
    clips = [(split, clip) for split, own in dataset.items() for clip in own]
    found = in_processes(
        encode,
        (clip for _, clip in clips),
        os.cpu_count() or 1,
        seconds=tfds_builder.Making().seconds,
    )
    rows: dict[str, Rows] = {split: [] for split in dataset}
    with contextlib.closing(found), tqdm(found, "decoding", len(clips), unit="clip") as bar:
        for (split, clip), encoded in zip(clips, bar, strict=True):
            rows[split].append(shards.row_of(clip, encoded))
    return rows


def _describe(rows: Rows, tokenize: CaptionTokenizer) -> dict[str, Any]:
    """Counts of a split."""
    kept = [row for row in rows if "skipped" not in row]
    captions = [caption for row in rows for caption in row["captions"]]
    lengths = tokenize.lengths(captions)
    reasons = collections.Counter(row["skipped"] for row in rows if "skipped" in row)
    return {
        "videos": len(rows),
        "usable": len(kept),
        "captions": len(captions),
        "caption_tokens": _spread(lengths),
        "cut_captions": int((lengths > tokenize.slots).sum()),
        "captions_with_sides": count_sides(captions),
        "stored_frames": _spread([row["stored"] for row in kept]),
        "video_frames": _spread([row["frames"] for row in kept]),
        "repeating_frames": sum(row["distinct"] < row["stored"] for row in kept),
        "reasons": dict(reasons.most_common()),
        "skipped": [
            {"reason": row["skipped"]}
            | {key: row[key] for key in ("id", "path", "where") if key in row}
            for row in rows
            if "skipped" in row
        ],
    }


def _spread(values: Sequence[int] | np.ndarray) -> list[int]:
    """[least, median, most]; [] of nothing."""
    if not len(values):
        return []
    return [int(np.min(values)), int(np.median(values)), int(np.max(values))]


def table(found: dict[str, Any]) -> str:
    """For people: a column a split."""
    splits = found["splits"]
    lines = [f"{found['dataset']}: {found['source']}"]
    rows = [
        ("videos", lambda s: f"{s['videos']:,}"),
        ("usable", lambda s: f"{s['usable']:,}"),
        ("captions", lambda s: f"{s['captions']:,}"),
        ("tokens a caption *", lambda s: _between(s["caption_tokens"])),
        (f"cut at {found['slots']} slots", lambda s: _share(s["cut_captions"], s["captions"])),
        ("say left or right", lambda s: _share(s["captions_with_sides"], s["captions"])),
        ("frames of a video *", lambda s: _between(s["video_frames"])),
        ("frames stored *", lambda s: _between(s["stored_frames"])),
        ("with repeated frames", lambda s: f"{s['repeating_frames']:,}"),
    ]
    lines.append(" " * 22 + "".join(f"{name:>18}" for name in splits))
    for label, cell in rows:
        lines.append(f"{label:<22}" + "".join(f"{cell(split):>18}" for split in splits.values()))
    for name, split in splits.items():
        for reason, count in split["reasons"].items():
            first = next(s for s in split["skipped"] if s["reason"] == reason)
            lines.append(f"{name}: {count} not usable: {reason}; first {shards.label_of(first)}")
    lines.append("* least / median / most")
    lines += [f"note: {note}" for note in found["notes"]]
    lines += [f"problem: {problem}" for problem in found["problems"]]
    if not found["problems"]:
        lines.append("whole")
    return "\n".join(lines)


def _between(spread: list[int]) -> str:
    return "{} / {} / {}".format(*spread) if spread else "-"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f} %)" if whole else "-"


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "FILE or FILE:METHOD, see configs/")
    flags.DEFINE_string("json", None, "also write what was found to this file")


def run(argv: Sequence[str]) -> int:
    """The program; returns its exit status."""
    cli.parse_flags(argv, __doc__)
    cli.set_up_logging()
    config = flags.FLAGS.config
    validate(config)
    found = check(config)
    if flags.FLAGS.json:
        files.write_json(flags.FLAGS.json, found)
    print(table(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    define_flags()
    sys.exit(cli.run(lambda: run(sys.argv)))
