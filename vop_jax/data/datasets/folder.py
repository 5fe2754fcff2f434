"""Your own videos: a folder, and a CSV or JSON Lines file of captions."""

import difflib
import hashlib
import math
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from absl import logging
from etils import epath

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.datasets.parsing import (
    caption,
    expect,
    parse_json,
    read_parquet,
    read_table,
    read_text,
    short,
)
from vop_jax.data.datasets.source import Source
from vop_jax.errors import UserError, VideoError
from vop_jax.video.files import stat

COLUMNS = ("video", "caption", "start", "end", "split")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
SPLIT = re.compile(r"\w+(-\w+)*")  # the names that tfds accepts for a split
SEGMENT = re.compile(r"@[\d.e+-]+-(end|[\d.e+-]+)$")  # the end of a segment's id

HELD_OUT = 0.1  # share of the videos that are "test" without a column `split`

Key = tuple[str, str, float | None, float | None]  # split, video, start, end


class Folder(Source):
    """Videos of the user's own."""

    kind, protocol, sizes = "folder", "", {}

    @property
    def records_name(self) -> str:
        """The same for all kinds of folders: their records do not differ."""
        return "folder"

    def read(
        self,
        annotations: str | os.PathLike,
        videos: str | os.PathLike | None,
        *,
        splits: Collection[str] | None = None,
        official_sizes: bool = True,
    ) -> tuple[Dataset, list[str]]:
        """See `Source.read` and `read_folder`."""
        dataset = read_folder(annotations, videos or os.path.dirname(annotations) or ".")
        for split in splits or ():
            if split not in dataset:
                raise UserError(
                    f"{annotations}: no split {split!r}; there are {', '.join(dataset)}"
                )
        clips = [clip for own in dataset.values() for clip in own]
        if videos is not None and not any(_exists(clip.path) for clip in clips):
            first = f"{clips[0].where}: {clips[0].path}"
            raise UserError(f"{videos}: none of the {len(clips)} videos is there; first {first}")
        return {k: v for k, v in dataset.items() if splits is None or k in splits}, []


DATASET = Folder()


def _exists(path: str) -> bool:
    try:
        stat(path)
    except VideoError:
        return False
    return True


def read_folder(annotations: str | os.PathLike, videos: str | os.PathLike) -> Dataset:
    """Reads the captions of a folder of videos.

    The file is CSV (`.csv`, `.tsv`) with a header, JSON Lines (`.jsonl`) or Parquet, with `video`
    (relative to `videos`), `caption` (one; in JSON Lines and Parquet also a list) and
    optionally `start` and `end` (seconds) and `split`. Rows of the same video, start, end and
    split are one clip with several captions. A `video` that no file can have as its name is
    reported when it is decoded, with its line. Without any `split`, the clips of a tenth of the
    videos, chosen by a hash of their names, are the split "test" and the others are "train".

    Raises:
        UserError: a file or folder does not exist, a column is missing or misspelt, or a row is
            not as described.
    """
    path = epath.Path(annotations)
    if not path.exists():
        raise UserError(f"{path}: no such annotation file")
    if not epath.Path(videos).is_dir():
        raise UserError(f"{videos}: no such folder of videos")
    root = os.fspath(videos)
    captions: dict[Key, list[str]] = {}
    first_names: dict[str, str] = {}  # `a.mp4` and `./a.mp4` are one video
    places: dict[Key, str] = {}
    for where, row in _rows(path):
        (split, video, start, end), own = _parse(where, row)
        key = (split, first_names.setdefault(_normalise(root, video), video), start, end)
        captions.setdefault(key, []).extend(own)
        places.setdefault(key, where)
    if not captions:
        raise UserError(f"{path}: no captions in it")
    without_split = [video for split, video, *_ in captions if not split]
    if without_split and len(without_split) < len(captions):
        raise UserError(
            f"{path}: {without_split[0]} has no split, other rows do; give one to all or to none"
        )
    dataset: Dataset = {}
    for key, own in captions.items():
        clip = _clip(root, key, own, places[key])
        dataset.setdefault(key[0] or _split_of(clip), []).append(clip)
    if without_split:
        _ensure_held_out(dataset)
        sizes = ", ".join(f"{len(clips)} {split}" for split, clips in dataset.items())
        logging.info("%s has no splits; chosen by a hash of the ids: %s", path, sizes)
    _warn_of_leaks(dataset)
    return dataset


def _clip(root: str, key: Key, captions: list[str], where: str) -> VideoClip:
    _, video, start, end = key
    clip_id = video
    if start is not None or end is not None:
        clip_id += f"@{_seconds_text(start or 0)}-{'end' if end is None else _seconds_text(end)}"
    location = _join(root, video)
    if ".." not in location:  # behind a link, `..` may be the folder of something else
        location = _normalise(root, video)
    return VideoClip(clip_id, location, tuple(dict.fromkeys(captions)), start, end, where)


def _join(root: str, video: str) -> str:
    return video if os.path.isabs(video) or "://" in video else os.path.join(root, video)


def _normalise(root: str, video: str) -> str:
    """One text for all spellings of a path; links are not followed."""
    scheme, separator, path = _join(root, video).rpartition("://")
    return scheme + separator + os.path.normpath(path)


def _seconds_text(seconds: float) -> str:
    """All digits: ids tell segments apart."""
    return repr(float(seconds)).removesuffix(".0")


def _rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:LINE", row) of each row, keys in lower case."""
    suffix = path.suffix.lower()
    if suffix == PARQUET:
        for number, row in enumerate(read_parquet(str(path), path.read_bytes()), 1):
            _check_columns(f"{path}:{number}", [key.lower() for key in row])
            yield f"{path}:{number}", {key.lower(): value for key, value in row.items()}
        return
    text = read_text(path)
    if suffix in DELIMITERS:
        rows = read_table(path, text, DELIMITERS[suffix])
        header = [name.lower() for name in next(rows)[1]]
        _check_columns(f"{path}:1", header)
        for line, cells in rows:
            yield f"{path}:{line}", dict(zip(header, cells, strict=True))
    elif suffix in JSON_LINES:
        yield from _json_rows(path, text)
    else:
        allowed = ", ".join([*DELIMITERS, *JSON_LINES, PARQUET])
        raise UserError(f"{path}: annotations are files of type {allowed}")


def _json_rows(path: epath.Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row, repeated = parse_json(path, line, number)
        except UserError as error:
            raise UserError(f"{error}; one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {type(row).__name__}; one object a line is needed")
        if repeated:
            raise UserError(f"{where}: the key {repeated[0]!r} twice; several captions are a list")
        _check_columns(where, [key.lower() for key in row])
        yield where, {key.lower(): value for key, value in row.items()}


def _check_columns(where: str, names: list[str]) -> None:
    """Raises UserError for a needed column that is missing or misspelt."""
    if repeated := [n for n in names if n in (*COLUMNS, "captions") and names.count(n) > 1]:
        raise UserError(f"{where}: several columns {repeated[0]!r}")
    absent = [name for name in COLUMNS if name not in names]
    if "captions" in names and "caption" in absent:
        absent.remove("caption")
    for name in names:
        close = difflib.get_close_matches(name, absent, n=1, cutoff=0.75)
        if close and name not in (*COLUMNS, "captions"):
            raise UserError(f"{where}: unknown column {name!r}; did you mean {close[0]!r}?")
    for name in ("video", "caption"):
        if name in absent:
            columns = short(", ".join(names)) if names else "nothing"
            raise UserError(f"{where}: no column {name!r}; found {columns}")


def _parse(where: str, row: dict[str, Any]) -> tuple[Key, list[str]]:
    """((split, video, start, end), captions) of one row."""
    video = expect(f"{where}: video", row["video"], str).strip()
    value = row.get("caption", row.get("captions"))
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise UserError(f"{where}: an empty list of captions")
    captions = [caption(f"{where}: caption", text) for text in texts]
    if not all(captions):
        raise UserError(f"{where}: an empty caption")
    split = row.get("split")
    split = "" if split is None else expect(f"{where}: split", split, str).strip()
    if split and (not SPLIT.fullmatch(split) or split == "all"):
        raise UserError(
            f"{where}: split is {split!r}; a name of letters, digits and _ is needed, with - only "
            "between them, and not 'all'"
        )
    start, end = _seconds(where, row, "start") or None, _seconds(where, row, "end")
    if end is not None and end <= (start or 0):
        raise UserError(f"{where}: end={end:g} is not after start={start or 0:g}")
    return (split, video or f"{os.path.basename(where)} (no video)", start, end), captions


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
    """The name of a clip's video, by which its segments are all held out or none is."""
    return clip_id if start is None and end is None else SEGMENT.sub("", clip_id)


def _split_of(clip: VideoClip) -> str:
    video = video_of(clip.id, clip.start, clip.end)
    return "test" if hash_of(video) < HELD_OUT else "train"


def _ensure_held_out(dataset: Dataset) -> None:
    """Moves one video's clips, or else one clip, where a small dataset left a split empty."""
    for empty, other in (("test", "train"), ("train", "test")):
        clips = dataset.get(other, [])
        if dataset.get(empty) or len(clips) < 2:
            continue
        videos = {clip.path for clip in clips}
        first = min(clips, key=lambda clip: hash_of(clip.id))
        moved = [c for c in clips if c is first or (len(videos) > 1 and c.path == first.path)]
        dataset[other] = [clip for clip in clips if clip not in moved]
        dataset[empty] = moved


def _warn_of_leaks(dataset: Dataset) -> None:
    """A video in two splits makes an evaluation look better than it is."""
    split_of: dict[str, str] = {}
    shared: dict[tuple[str, str], set[str]] = {}
    for split, clips in dataset.items():
        for clip in clips:
            first = split_of.setdefault(clip.path, split)
            if first != split:
                shared.setdefault((first, split), set()).add(clip.path)
    for (first, second), videos in shared.items():
        logging.warning("videos with clips both in %s and in %s: %d", first, second, len(videos))
