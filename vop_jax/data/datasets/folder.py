"""Annotation files become clips: a folder of videos with a CSV or JSON Lines file of captions."""

import csv
import difflib
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.datasets.parsing import NO_TEXT
from vop_jax.errors import UserError

COLUMNS = ("video", "caption", "start", "end", "split")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SPLIT = re.compile(r"\w+(-\w+)*")  # what tfds takes as the name of a split
STRETCH = re.compile(r"@[\d.e+-]+-(end|[\d.e+-]+)$")  # what an id of a stretch ends with
JSON_LINES = (".jsonl", ".ndjson", ".json")

# Without a column `split`, about this share of the videos is held out for evaluation.
HELD_OUT = 0.1


def read_folder(annotations: str | os.PathLike, videos: str | os.PathLike) -> Dataset:
    """Reads the captions of a folder of videos.

    The file is CSV (`.csv`, `.tsv`) with a header, or JSON Lines (`.jsonl`), with `video`
    (relative to `videos`), `caption` (one; in JSON Lines also a list) and, where wanted,
    `start` and `end` (seconds) and `split`. Rows of the same video, start, end and split are
    one clip with several captions. A `video` that cannot be a file is left for the decoding to
    report, which knows its line. Without any `split`, the clips of a tenth of the videos, chosen
    by a hash of their names, are the split "test" and the others are "train".

    Raises:
        UserError: a file or folder that does not exist, a column that is missing or misspelt,
            or the first row, by its line, that is not as described.
    """
    path = epath.Path(annotations)
    if not path.exists():
        raise UserError(f"{path}: no such annotation file")
    if not epath.Path(videos).is_dir():
        raise UserError(f"{videos}: no such folder of videos")
    captions: dict[tuple, list[str]] = {}  # (split, video, start, end) -> captions
    spelling: dict[str, str] = {}  # file -> its first name: `a.mp4` and `./a.mp4` are one video
    lines: dict[tuple, str] = {}
    for where, row in _rows(path):
        (split, video, *segment), own = _parse(where, row)
        video = spelling.setdefault(_normalised(os.fspath(videos), video), video)
        key = (split, video, *segment)
        captions.setdefault(key, []).extend(own)
        lines.setdefault(key, where)
    if not captions:
        raise UserError(f"{path}: no captions in it")
    with_split = [bool(split) for split, *_ in captions]
    if any(with_split) and not all(with_split):
        video = next(video for split, video, *_ in captions if not split)
        raise UserError(f"{path}: {video} has no split, other rows do; give one to all or to none")
    dataset: Dataset = {}
    for (split, video, start, end), own in captions.items():
        clip_id = (
            video if start is None and end is None else f"{video}@{_short(start or 0)}-{_to(end)}"
        )
        where = lines[split, video, start, end]
        location = _location(os.fspath(videos), video)
        if ".." not in location:  # which may be another folder's behind a link
            location = _normalised(os.fspath(videos), video)
        clip = VideoClip(clip_id, location, tuple(dict.fromkeys(own)), start, end, where)
        dataset.setdefault(split or _split_of(clip), []).append(clip)
    if not all(with_split):
        _ensure_held_out(dataset)
        sizes = ", ".join(f"{len(clips)} {split}" for split, clips in dataset.items())
        logging.info("%s has no splits; chosen by a hash of the ids: %s", path, sizes)
    _warn_of_leaks(dataset)
    return dataset


def _location(videos: str, video: str) -> str:
    return video if os.path.isabs(video) or "://" in video else os.path.join(videos, video)


def _normalised(videos: str, video: str) -> str:
    """One text for all spellings of a path; links are not followed."""
    scheme, separator, path = _location(videos, video).rpartition("://")
    return scheme + separator + os.path.normpath(path)


def _to(end: float | None) -> str:
    return "end" if end is None else _short(end)


def _short(seconds: float) -> str:
    """All its digits, and no more: ids tell stretches apart."""
    return repr(float(seconds)).removesuffix(".0")


def _rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:LINE", row) of each row, keys in lower case."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; an annotation file is needed") from None
    kind = path.suffix.lower()
    if kind in DELIMITERS:
        yield from _csv_rows(path, text, DELIMITERS[kind])
    elif kind in JSON_LINES:
        yield from _json_rows(path, text)
    else:
        allowed = ", ".join([*DELIMITERS, *JSON_LINES])
        raise UserError(f"{path}: annotations are files of type {allowed}")


def _csv_rows(path: epath.Path, text: str, delimiter: str) -> Iterator[tuple[str, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        _check_columns(f"{path}:1", header)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{path}:{reader.line_num}"
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} cells, the header has {len(header)}; quote a caption "
                    f"that holds {delimiter!r}"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _json_rows(path: epath.Path, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=functools.partial(_once, where))
        except (ValueError, RecursionError) as error:  # also numbers too long, lists too deep
            why = getattr(error, "msg", error)
            raise UserError(f"{where}: not JSON ({why}); one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {type(row).__name__}; one object a line is needed")
        _check_columns(where, [key.lower() for key in row])
        yield where, {key.lower(): value for key, value in row.items()}


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `json` would keep the last of two values alone."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in row if keys.count(key) > 1)
        raise UserError(f"{where}: the key {twice!r} twice; several captions are a list")
    return row


def _check_columns(where: str, names: list[str]) -> None:
    """Raises for a column that is needed and missing, or there under a misspelt name."""
    if repeated := [n for n in names if n in (*COLUMNS, "captions") and names.count(n) > 1]:
        raise UserError(f"{where}: several columns {repeated[0]!r}")
    absent = [name for name in COLUMNS if name not in names]
    if "captions" in names and "caption" in absent:
        absent.remove("caption")
    for name in names:
        near = difflib.get_close_matches(name, absent, n=1, cutoff=0.75)
        if near and name not in (*COLUMNS, "captions"):
            raise UserError(f"{where}: unknown column {name!r}; did you mean {near[0]!r}?")
    for name in ("video", "caption"):
        if name in absent:
            found = ", ".join(names) or "nothing"
            raise UserError(f"{where}: no column {name!r}; found {found}")


def _parse(where: str, row: dict[str, Any]) -> tuple[tuple, list[str]]:
    """((split, video, start, end), captions) of one row."""
    video = row["video"]
    if not isinstance(video, str):
        raise UserError(f"{where}: video is {video!r}; a file name is needed")
    video = video.strip() or f"{os.path.basename(where)} (no video)"
    given = row.get("caption", row.get("captions"))
    captions: list[Any] = given if isinstance(given, list) else [given]
    if not captions:
        raise UserError(f"{where}: an empty list of captions")
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"{where}: caption is {caption!r}; text is needed")
        if not caption.strip():
            raise UserError(f"{where}: an empty caption")
    for text in captions:
        if NO_TEXT.search(text):
            raise UserError(f"{where}: a NUL or half a character (lone surrogate) in {text!r}")
    split = row.get("split")
    if split is not None and not isinstance(split, str):
        raise UserError(f"{where}: split is {split!r}; a name is needed")
    split = (split or "").strip()
    if split and (not SPLIT.fullmatch(split) or split == "all"):
        raise UserError(
            f"{where}: split is {split!r}; a name of letters, digits and _ is needed, with - only "
            "between them, and not 'all'"
        )
    start, end = _seconds(where, row, "start") or None, _seconds(where, row, "end")
    if end is not None and end <= (start or 0):
        raise UserError(f"{where}: end={end:g} is not after start={start or 0:g}")
    return (split, video, start, end), [c.strip() for c in captions]


def _seconds(where: str, row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool) or not math.isfinite(seconds) or seconds < 0:
        raise UserError(f"{where}: {name}={value!r}; seconds, 0 or more, are needed")
    return seconds


def hash_of(clip_id: str) -> float:
    """A fixed number in [0, 1) for an id."""
    digest = hashlib.sha256(clip_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def video_of(clip_id: str, start: float | None, end: float | None) -> str:
    """The name of a clip's video: stretches of one are held out together, or not at all."""
    whole = start is None and end is None
    return clip_id if whole else STRETCH.sub("", clip_id)


def _split_of(clip: VideoClip) -> str:
    video = video_of(clip.id, clip.start, clip.end)
    return "test" if hash_of(video) < HELD_OUT else "train"


def _ensure_held_out(dataset: Dataset) -> None:
    """Moves one video's clips, or else one clip, where a small dataset left a side empty."""
    for empty, other in (("test", "train"), ("train", "test")):
        there = dataset.get(other, [])
        if dataset.get(empty) or len(there) < 2:
            continue
        videos = {clip.path for clip in there}
        first = min(there, key=lambda clip: hash_of(clip.id))
        moved = [c for c in there if c is first or (len(videos) > 1 and c.path == first.path)]
        dataset[other] = [clip for clip in there if clip not in moved]
        dataset[empty] = moved


def _warn_of_leaks(dataset: Dataset) -> None:
    """A video in two splits makes an evaluation look better than it is."""
    seen: dict[str, str] = {}
    shared: dict[tuple[str, str], set[str]] = {}
    for split, clips in dataset.items():
        for clip in clips:
            first = seen.setdefault(clip.path, split)
            if first != split:
                shared.setdefault((first, split), set()).add(clip.path)
    for (first, second), videos in shared.items():
        logging.warning("videos with clips both in %s and in %s: %d", first, second, len(videos))
