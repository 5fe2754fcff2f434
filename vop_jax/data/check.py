"""Checks that a dataset is complete and fits a config, and describes it.

    vop check --config=msrvtt9k:vop_f+c --config.data.records=DIR

Reads the packed records; where there are none, decodes all videos. The exit status is 1 if a
split is incomplete or the records do not fit the config.
"""

import collections
import contextlib
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from vop_jax import cli
from vop_jax.config.base import load_config, validate
from vop_jax.config.clip import preset
from vop_jax.data.datasets import registry
from vop_jax.data.datasets.source import Source
from vop_jax.data.load import count_sides, flip_warning
from vop_jax.data.records import layout, read
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions, encode_clips
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError
from vop_jax.storage import files
from vop_jax.tuning.methods import method_of

OPTIONS = WriteOptions()  # of decoding


class Checker:
    """Collects the rows of a config's dataset, and what is notable or wrong about them.

    Attributes:
        rows: split -> a row for each clip, as in the index of records.
        notes: what a run logs too.
        problems: what makes the dataset incomplete or unfit, one line each.
    """

    def __init__(self, config: ConfigDict):
        self.config, self.data = config, config.data
        self.source: Source = registry.get(config.data.kind)
        self.preprocessing = Preprocessing.from_mapping(config.data)
        self.rows: dict[str, list[layout.Row]] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []

    def read_records(self, records: epath.Path) -> None:
        """Takes the rows of finished records, and compares these with config and annotations."""
        data, name = self.data, self.source.records_name
        if records.parent.name != name:
            raise UserError(f"{data.records}: records of {records.parent.name!r}, not of {name!r}")
        metadata = layout.read_json(records / layout.METADATA)
        preprocessing, prints = metadata["preprocessing"], metadata["clips"]
        for key, stored, configured in self.preprocessing.differences(preprocessing):
            self.problems.append(
                f"records were made with data.{key}={stored!r}, the config says {configured!r}"
            )
        if older := self.preprocessing.older_rule(preprocessing):
            self.notes.append(f"{data.records}: {older}")
        if data.annotations:
            dataset, _ = self.source.read(
                data.annotations,
                None,  # finished records do not need their videos
                official_sizes=data.official_sizes,
                splits=list(prints),
            )
            self.problems += [
                f"split {split!r}: the annotations have other clips or captions"
                for split, clips in dataset.items()
                if layout.fingerprint(clips) != prints[split]
            ]
        for split in prints:
            try:
                self.rows[split] = read.Split(records, split).rows
                read.check_content(records, split)
            except UserError as error:
                self.problems.append(str(error))
        self._check_names(prints)

    def decode_videos(self) -> None:
        """Takes the rows that records would have, by decoding all videos."""
        dataset, notes = self.source.read(
            self.data.annotations, self.data.videos, official_sizes=self.data.official_sizes
        )
        self.notes += notes
        self._check_names(dataset)
        clips = [(split, clip) for split, own in dataset.items() for clip in own]
        results = encode_clips([clip for _, clip in clips], self.preprocessing, OPTIONS)
        self.rows = {split: [] for split in dataset}
        bar = tqdm(results, "decoding", len(clips), unit="clip")
        with contextlib.closing(results), bar:
            for (split, clip), result in zip(clips, bar, strict=True):
                self.rows[split].append(layout.row_of(clip, result))

    def _check_names(self, splits: Collection[str]) -> None:
        """Adds a problem for each split that the config names and the dataset lacks."""
        needs_val = self.config.train.select == "best" and not self.data.val_share
        for key in ("train_split", "eval_split", *(["val_split"] if needs_val else [])):
            if self.data[key] not in splits:
                self.problems.append(
                    f"config.data.{key}={self.data[key]!r}: no such split; "
                    f"found {', '.join(splits)}"
                )

    def describe(self) -> tuple[int, dict[str, Any]]:
        """(token slots of a caption, counts of each split); adds problems of their sizes."""
        data = self.data
        slots = method_of(self.config).text_slots(preset(self.config, default="ViT-B/32"))
        tokenize = CaptionTokenizer(slots)
        splits = {split: _describe(rows, tokenize) for split, rows in self.rows.items()}
        train_captions = (row["captions"] for row in self.rows.get(data.train_split, ()))
        if warning := flip_warning(data, train_captions):
            self.notes.append(warning)
        for split, counts in splits.items():
            missing, limit = counts["videos"] - counts["usable"], data.max_skipped
            if missing:
                refused = missing > limit * counts["videos"]
                self.problems.append(
                    f"split {split!r}: {missing} of {counts['videos']} videos not usable, "
                    f"{'more than' if refused else 'within'} config.data.max_skipped={limit:g}: "
                    f"a run {'refuses' if refused else 'goes on without them'}"
                )
        for split, counts in splits.items() if data.official_sizes else ():
            try:
                self.source.check_sizes({split: (counts["videos"], counts["captions"])})
            except UserError as error:
                self.problems.append(str(error))
        return slots, splits


def check(config: ConfigDict) -> dict[str, Any]:
    """Describes a config's dataset.

    Returns:
        {"dataset", "source", "slots", "splits": {name: counts}, "notes", "problems"}; the dataset
        is complete if there are no problems.

    Raises:
        UserError: there are neither records nor annotations, or they cannot be read.
    """
    data, checker = config.data, Checker(config)
    records = layout.find_records(data.records) if data.records else None
    if records is not None:
        checker.read_records(records)
    elif data.annotations and data.videos:
        checker.decode_videos()
    else:
        raise UserError(
            f"config.data.records={data.records!r}: no records there; without them "
            "config.data.annotations and config.data.videos are needed"
        )
    slots, splits = checker.describe()
    return {
        "dataset": data.kind,
        "source": os.fspath(records or data.videos),
        "slots": slots,
        "splits": splits,
        "notes": checker.notes,
        "problems": checker.problems,
    }


def _describe(rows: list[layout.Row], tokenize: CaptionTokenizer) -> dict[str, Any]:
    """Counts of a split."""
    usable = [row for row in rows if "skipped" not in row]
    captions = [caption for row in rows for caption in row["captions"]]
    lengths = tokenize.lengths(captions)
    skipped = layout.skipped_of(rows)
    return {
        "videos": len(rows),
        "usable": len(usable),
        "captions": len(captions),
        "caption_tokens": _spread(lengths),
        "cut_captions": int((lengths > tokenize.slots).sum()),
        "captions_with_sides": count_sides(captions),
        "stored_frames": _spread([row["stored"] for row in usable]),
        "video_frames": _spread([row["frames"] for row in usable]),
        "repeating_frames": sum(row["distinct"] < row["stored"] for row in usable),
        "reasons": dict(collections.Counter(row["reason"] for row in skipped).most_common()),
        "skipped": skipped,
    }


def _spread(values: Sequence[int] | np.ndarray) -> list[int]:
    """[least, median, most]; [] of nothing."""
    if not len(values):
        return []
    return [int(np.min(values)), int(np.median(values)), int(np.max(values))]


def table(checked: dict[str, Any]) -> str:
    """The result of `check` as text, with a column for each split."""
    splits = checked["splits"]
    rows = [
        ("videos", lambda s: f"{s['videos']:,}"),
        ("usable", lambda s: f"{s['usable']:,}"),
        ("captions", lambda s: f"{s['captions']:,}"),
        ("tokens a caption *", lambda s: _between(s["caption_tokens"])),
        (f"cut at {checked['slots']} slots", lambda s: _share(s["cut_captions"], s["captions"])),
        ("say left or right", lambda s: _share(s["captions_with_sides"], s["captions"])),
        ("frames of a video *", lambda s: _between(s["video_frames"])),
        ("frames stored *", lambda s: _between(s["stored_frames"])),
        ("with repeated frames", lambda s: f"{s['repeating_frames']:,}"),
    ]
    lines = [f"{checked['dataset']}: {checked['source']}"]
    lines.append(" " * 22 + "".join(f"{name:>18}" for name in splits))
    for label, cell in rows:
        lines.append(f"{label:<22}" + "".join(f"{cell(split):>18}" for split in splits.values()))
    for name, split in splits.items():
        for reason, count in split["reasons"].items():
            first = next(row for row in split["skipped"] if row["reason"] == reason)
            lines.append(f"{name}: {count} not usable: {reason}; first {layout.label_of(first)}")
    lines.append("* least / median / most")
    lines += [f"note: {note}" for note in checked["notes"]]
    lines += [f"problem: {problem}" for problem in checked["problems"]] or ["whole"]
    return "\n".join(lines)


def _between(spread: list[int]) -> str:
    return "{} / {} / {}".format(*spread) if spread else "-"


def _share(part: int, total: int) -> str:
    return f"{part:,} ({100 * part / total:.1f} %)" if total else "-"


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags but --config."""
    flags.DEFINE_string("json", None, "also write the result to this file", flag_values=values)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""

    def program() -> int:
        arguments = sys.argv[1:] if argv is None else argv
        values, overrides = cli.parse_flags(arguments, __doc__, define_flags)
        config = cli.override(load_config(values.config), overrides)
        cli.set_up_logging()
        validate(config)
        checked = check(config)
        if values.json:
            files.write_json(values.json, checked)
        print(table(checked))
        return 1 if checked["problems"] else 0

    return cli.run(program)


if __name__ == "__main__":
    sys.exit(main())
