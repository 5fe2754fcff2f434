"""A query: its filter, and the search of one state of an index for its hits."""

import dataclasses
import datetime
import json
import posixpath
import sqlite3
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.stores.base import TABLES, Snapshot

Date = str | datetime.date | datetime.datetime | float | None

DAY = datetime.timedelta(days=1)
FEW = 20_000  # matches up to which a store searches among their ids; of more, hits are filtered
FIRST, EACH = 64, 16  # vectors that are looked at first, and more for each hit of another file
MOST = 16_384  # hits of one search; vectors that are looked at first
WIDER = 8  # times as many, where these did not suffice

SOURCES = {
    "videos": "moments JOIN files ON files.id = moments.file",
    "captions": "captions LEFT JOIN files ON files.path = captions.path",
}
HIT_COLUMNS = {
    "videos": "moments.id, files.id, files.path, moments.start, moments.\"end\", ''",
    "captions": "captions.id, COALESCE(files.id, 0), captions.path, captions.start, "
    'captions."end", captions.text',
}


@dataclasses.dataclass(frozen=True)
class Hit:
    """A result of a search.

    Attributes:
        file_id: of the video, for `Index.path_of`; 0 for a caption of no indexed video.
        path: of the video, relative to the indexed folder; "" for a caption that names none.
        score: cosine of the angle between the vectors.
        start, end: seconds of the moment, or of the whole clip.
        caption: the text of a caption, else "".
    """

    file_id: int
    path: str
    score: float
    start: float
    end: float
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Filter:
    """A condition on rows of `files`, as SQL.

    Attributes:
        sql: "", or begins with AND.
        values: of its question marks.
    """

    sql: str = ""
    values: tuple[Any, ...] = ()


def make_filter(
    folder: str | None = None,
    since: Date = None,
    until: Date = None,
    path: str = "files.path",
) -> Filter:
    """The filter of a search.

    Args:
        folder: relative to the indexed folder; keeps files in it and below.
        since, until: keep files that were last changed then: seconds since 1970, datetimes, or
            days as dates or "2026-11-25", in local time; the day of `until` is included.
        path: the column that `folder` applies to.

    Raises:
        UserError: not a date, or a folder outside of the indexed one.
    """
    conditions: list[str] = []
    values: list[Any] = []
    if folder is not None and (prefix := _prefix(folder)):
        # A range uses the table's index; "0" is the character after "/".
        conditions.append(f"AND {path} >= ? AND {path} < ?")
        values += [prefix + "/", prefix + "0"]
    if since is not None:
        conditions.append("AND files.mtime >= ?")
        values.append(_nanoseconds("since", since))
    if until is not None:
        conditions.append("AND files.mtime < ?")
        values.append(_nanoseconds("until", until))
    return Filter(" ".join(conditions), tuple(values))


def _prefix(folder: str) -> str:
    """Its path without ./ and trailing /; "" for the indexed folder itself."""
    inside = posixpath.normpath(folder)
    if inside.startswith(("/", "../")) or inside == "..":
        raise UserError(f"folder={folder!r}: must be inside the indexed folder, relative to it")
    # SQLite stores no lone surrogate (half a character).
    if "\0" in folder or any("\ud800" <= c <= "\udfff" for c in folder):
        raise UserError(f"folder={folder!r}: not a name of a folder")
    return "" if inside == "." else inside


def _nanoseconds(name: str, date: Any) -> int:
    """Since 1970, within int64; the end of a day for `until`."""
    time = date
    try:
        if isinstance(time, str):
            try:
                time = datetime.date.fromisoformat(time)
            except ValueError:
                time = datetime.datetime.fromisoformat(time)
        if isinstance(time, datetime.date) and not isinstance(time, datetime.datetime):
            days = int(name == "until" and time < datetime.date.max)
            time = datetime.datetime.combine(time, datetime.time()) + days * DAY
        if isinstance(time, datetime.datetime):
            try:
                time = time.timestamp()
            except (ValueError, OverflowError, OSError):  # local time near the years 1 and 9999
                time = time.replace(tzinfo=datetime.UTC).timestamp()
        return int(max(min(10**9 * time, 2**63 - 1), -(2**63)))
    except (ValueError, OverflowError, TypeError):
        raise UserError(f"{name}={date!r}: must be a date such as 2026-11-25") from None


def search(
    db: sqlite3.Connection,
    store: Snapshot,
    to: str,
    where: Filter,
    vectors: np.ndarray,
    k: int,
    per_file: bool,
) -> list[list[Hit]]:
    """The best k hits of each vector [N, E]; looks at more of the nearest until k of them pass."""
    allowed = _matching_ids(db, to, where) if where.sql else None
    total = len(store) if allowed is None else len(allowed)
    count = min(FIRST + (EACH if per_file else 1) * k, max(k, MOST))
    if where.sql and allowed is None:
        count *= WIDER  # most do not pass
    while True:
        count = min(count, total)
        if not count:
            return [[] for _ in vectors]
        ids, scores = store.search(vectors, count, allowed)
        hits = [
            _hits(db, to, where, per_file, *nearest, k)
            for nearest in zip(ids.tolist(), scores.tolist(), strict=True)
        ]
        fewest = min(map(len, hits))
        if count == total or fewest == k or (per_file and fewest == _count_files(db, to)):
            return hits
        count *= WIDER


def _count_files(db: sqlite3.Connection, to: str) -> int | None:
    """The most hits that there can be of videos."""
    if to != "videos":
        return None
    return db.execute("SELECT COUNT(*) FROM files WHERE reason IS NULL").fetchone()[0]


def _matching_ids(db: sqlite3.Connection, to: str, where: Filter) -> np.ndarray | None:
    """int64 ids of the rows that pass a filter; None for more than `FEW`."""
    statement = f"SELECT {TABLES[to]}.id FROM {SOURCES[to]} WHERE 1 {where.sql} LIMIT {FEW + 1}"
    ids = np.fromiter((row[0] for row in db.execute(statement, where.values)), np.int64)
    return None if len(ids) > FEW else ids


def _hits(
    db: sqlite3.Connection,
    to: str,
    where: Filter,
    per_file: bool,
    ids: list[int],
    scores: list[float],
    k: int,
) -> list[Hit]:
    """The first k vectors that the catalog names and the filter passes."""
    rows = db.execute(
        f"SELECT {HIT_COLUMNS[to]} FROM {SOURCES[to]} "
        f"WHERE {TABLES[to]}.id IN (SELECT value FROM json_each(?)) {where.sql}",
        (json.dumps(ids), *where.values),
    )
    named = {row[0]: row[1:] for row in rows}
    hits: list[Hit] = []
    seen = set()
    for number, score in zip(ids, scores, strict=True):
        if number not in named:
            continue
        file, path, start, end, caption = named[number]
        if per_file and (caption or file) in seen:
            continue
        seen.add(caption or file)
        hits.append(Hit(file, path, score, start, end, caption))
        if len(hits) == k:
            break
    return hits
