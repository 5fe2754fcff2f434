"""A query: its filter, and the search of one state of an index for its hits."""

import dataclasses
import datetime
import json
import math
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
        frame: seconds of the frame that is nearest to the query, if results were re-ranked.
    """

    file_id: int
    path: str
    score: float
    start: float
    end: float
    caption: str = ""
    frame: float | None = None


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which files a search looks at.

    Attributes:
        below: the folder that they are in, relative to the indexed one; None: any.
        since, until: nanoseconds since 1970 between which they were last changed.
    """

    below: str | None = None
    since: int | None = None
    until: int | None = None

    @property
    def paths(self) -> tuple[str, str]:
        """The first path that passes, and the first one after it that does not."""
        return f"{self.below}/", f"{self.below}0"  # "0" is the character after "/"

    def sql(self, path: str = "files.path") -> tuple[str, tuple]:
        """("" or AND …, the values of its question marks), for rows of `files`.

        Args:
            path: the column that the folder applies to.
        """
        conditions: list[str] = []
        values: list[Any] = []
        if self.below is not None:
            # A range uses the table's index.
            conditions.append(f"AND {path} >= ? AND {path} < ?")
            values += self.paths
        if self.since is not None:
            conditions.append("AND files.mtime >= ?")
            values.append(self.since)
        if self.until is not None:
            conditions.append("AND files.mtime < ?")
            values.append(self.until)
        return " ".join(conditions), tuple(values)


def make_filter(folder: str | None = None, since: Date = None, until: Date = None) -> Filter:
    """A filter of what a user gave.

    Args:
        folder: relative to the indexed folder; keeps files in it and below.
        since, until: keep files that were last changed then: seconds since 1970, datetimes, or
            days as dates or "2026-11-25", in local time; the day of `until` is included.

    Raises:
        UserError: not a date, or a folder outside of the indexed one.
    """
    below = None
    if folder is not None:
        below = posixpath.normpath(folder)  # without ./ and trailing /
        if below.startswith(("/", "../")) or below == "..":
            raise UserError(f"folder={folder!r}: must be inside the indexed folder, relative to it")
        # SQLite stores no lone surrogate (half a character).
        if "\0" in folder or any("\ud800" <= c <= "\udfff" for c in folder):
            raise UserError(f"folder={folder!r}: not a name of a folder")
        below = None if below == "." else below
    return Filter(
        below,
        None if since is None else _nanoseconds("since", since),
        None if until is None else _nanoseconds("until", until),
    )


def checked_min_score(value: Any) -> float | str | None:
    """A minimum of scores: "auto", None or a number; "none" and numbers may be text.

    Raises:
        UserError: anything else.
    """
    if value in (None, "auto", "none"):
        return None if value == "none" else value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not -1 <= number <= 1:
        raise UserError(f"min_score={value!r}: must be auto, none or a number from -1 to 1")
    return number


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
        return int(max(min(10**9 * time, 2**63 - 1), 1 - 2**63))  # Milvus reads no -2**63
    except (ValueError, OverflowError, TypeError):
        raise UserError(f"{name}={date!r}: must be a date such as 2026-11-25") from None


def search(
    db: sqlite3.Connection,
    store: Snapshot,
    vectors: np.ndarray,
    k: int,
    to: str,
    where: tuple[str, tuple],
    per_file: bool,
) -> list[list[tuple[int, Hit]]]:
    """The best k hits of each vector [N, E], each after the id of its moment or caption.

    Looks at more of the nearest until k of them pass.
    """
    condition, values = where
    source, table = SOURCES[to], TABLES[to]
    allowed = None
    if condition:
        statement = f"SELECT {table}.id FROM {source} WHERE 1 {condition} LIMIT {FEW + 1}"
        allowed = np.fromiter((row[0] for row in db.execute(statement, values)), np.int64)
        allowed = allowed if len(allowed) <= FEW else None

    def first_hits(ids: list[int], scores: list[float]) -> list[tuple[int, Hit]]:
        """The first k vectors that the catalog names and the filter passes."""
        rows = db.execute(
            f"SELECT {HIT_COLUMNS[to]} FROM {source} "
            f"WHERE {table}.id IN (SELECT value FROM json_each(?)) {condition}",
            (json.dumps(ids), *values),
        )
        named = {row[0]: row[1:] for row in rows}
        hits: dict[Any, tuple[int, Hit]] = {}
        for number, score in zip(ids, scores, strict=True):
            if number in named:
                file, path, start, end, caption = named[number]
                key = (caption or file) if per_file else number
                hits.setdefault(key, (number, Hit(file, path, score, start, end, caption)))
                if len(hits) == k:
                    break
        return list(hits.values())

    def are_all_files(count: int) -> bool:
        statement = "SELECT COUNT(*) FROM files WHERE reason IS NULL"
        return per_file and to == "videos" and db.execute(statement).fetchone()[0] == count

    total = len(store) if allowed is None else len(allowed)
    count = min(FIRST + (EACH if per_file else 1) * k, max(k, MOST))
    if condition and allowed is None:
        count *= WIDER  # most do not pass
    while True:
        count = min(count, total)
        if not count:
            return [[] for _ in vectors]
        nearest = store.search(vectors, count, allowed)
        hits = [first_hits(*row) for row in zip(*(x.tolist() for x in nearest), strict=True)]
        fewest = min(map(len, hits), default=k)
        if count == total or fewest == k or are_all_files(fewest):
            return hits
        count *= WIDER
