"""One search of one state of an index: the nearest vectors become hits."""

import contextlib
import dataclasses
import datetime
import json
import posixpath
import sqlite3
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.stores.base import MOST, Snapshot

Date = str | datetime.date | datetime.datetime | float | None

DAY = datetime.timedelta(days=1)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

TARGETS = ("videos", "captions")
# So many vectors are told to a store one by one; of a larger share the best of all are filtered.
FEW = 20_000
# Nearest vectors that are looked at first: many may be moments of one file.
FIRST, EACH = 64, 16
WIDER = 8  # times as many, where these were not enough

# The columns of a hit but for its score.
FOUND = {
    "videos": "moments.id, files.id, files.path, moments.start, moments.\"end\", '' "
    "FROM moments JOIN files ON files.id = moments.file WHERE",
    "captions": "captions.id, COALESCE(files.id, 0), captions.path, captions.start, "
    'captions."end", captions.text '
    "FROM captions LEFT JOIN files ON files.path = captions.path WHERE",
}
ID = {"videos": "moments.id", "captions": "captions.id"}


@dataclasses.dataclass(frozen=True)
class Hit:
    """What a search found.

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
        sql: "" where there is none, else it begins with AND.
        values: of its question marks.
    """

    sql: str = ""
    values: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sql)


def make_filter(
    folder: str | None = None,
    since: Date = None,
    until: Date = None,
    path: str = "files.path",
) -> Filter:
    """What restricts a search.

    Args:
        folder: relative to the indexed folder; files in it and below.
        since, until: when files were last changed: seconds since 1970, datetimes, or days as dates
            or "2026-11-25", local time; `until` a day is to its end.
        path: the column that `folder` is about.

    Raises:
        UserError: no date, or a folder outside of the indexed one.
    """
    conditions: list[str] = []
    values: list[Any] = []
    if folder is not None and (prefix := _prefix(folder)):
        # A range, which an index answers: "0" comes after "/".
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
    # Half a character (a lone surrogate) is in no path that SQLite could hold.
    if "\0" in folder or any("\ud800" <= c <= "\udfff" for c in folder):
        raise UserError(f"folder={folder!r}: not a name of a folder")
    return "" if inside == "." else inside


def _nanoseconds(what: str, given: Any) -> int:
    """Since 1970, as near as int64 comes; of `until` a day its end."""
    try:
        if isinstance(given, str):
            try:
                given = datetime.date.fromisoformat(given)
            except ValueError:
                given = datetime.datetime.fromisoformat(given)
        if isinstance(given, datetime.date) and not isinstance(given, datetime.datetime):
            days = int(what == "until" and given < datetime.date.max)
            given = datetime.datetime.combine(given, datetime.time()) + days * DAY
        nanoseconds = 10**9 * (_seconds(given) if isinstance(given, datetime.datetime) else given)
        return int(max(min(nanoseconds, 2**63 - 1), -(2**63)))
    except (ValueError, OverflowError, TypeError):
        raise UserError(f"{what}={given!r}: must be a date such as 2026-11-25") from None


def _seconds(time: datetime.datetime) -> float:
    try:
        return time.timestamp()
    except (ValueError, OverflowError, OSError):  # in the first or the last year there can be
        return (time.replace(tzinfo=datetime.UTC) - EPOCH).total_seconds()


class Search:
    """One search of one state of an index."""

    def __init__(
        self, db: sqlite3.Connection, store: Snapshot, to: str, where: Filter, per_file: bool
    ):
        self._db, self._store, self._to, self._where = db, store, to, where
        self._per_file = per_file

    def run(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """Looks at more and more of the nearest, until k of them are what is asked for."""
        allowed = self._matching(FEW) if self._where else None
        total = len(self._store) if allowed is None else len(allowed)
        count = FIRST + (EACH if self._per_file else 1) * k
        if self._where and allowed is None:
            count *= WIDER  # most will not pass
        while True:
            count = min(count, total, MOST)
            if not count:
                return [[] for _ in vectors]
            ids, scores = self._store.search(vectors, count, allowed)
            found = [self._hits(*row, k) for row in zip(ids, scores, strict=True)]
            short = [i for i, hits in enumerate(found) if len(hits) < k]
            if not short or count == total:
                return found
            if count == MOST:
                for i in short:
                    found[i] = self._by_exclusion(vectors[i], k)
                return found
            count *= WIDER

    def _by_exclusion(self, vector: np.ndarray, k: int) -> list[Hit]:
        """Where thousands of the nearest are moments of few files: again, without those files."""
        ids = self._matching(None)
        assert ids is not None
        hits: list[Hit] = []
        while len(hits) < k and len(ids):
            found, scores = self._store.search(vector[None], min(MOST, len(ids)), ids)
            more = self._hits(found[0], scores[0], k - len(hits))
            hits += more
            if not self._per_file or not more:  # none: the store lacks the vectors of the others
                break
            ids = np.setdiff1d(ids, self._of_same(hits), assume_unique=True)
        return hits

    def _of_same(self, hits: list[Hit]) -> np.ndarray:
        """int64 ids of all moments of the files of hits, or captions of their texts."""
        if self._to == "videos":
            return self._ids(
                "SELECT id FROM moments WHERE file IN (SELECT value FROM json_each(?))",
                json.dumps([hit.file_id for hit in hits]),
            )
        return self._ids(
            "SELECT id FROM captions WHERE text IN (SELECT value FROM json_each(?))",
            json.dumps([hit.caption for hit in hits]),
        )

    def _ids(self, statement: str, *values: Any) -> np.ndarray:
        return np.fromiter((row[0] for row in self._db.execute(statement, values)), np.int64)

    def _matching(self, most: int | None) -> np.ndarray | None:
        """int64 ids of what the filter lets pass; None for more than `most`."""
        source = FOUND[self._to][FOUND[self._to].index("FROM") :]
        statement = f"SELECT {ID[self._to]} {source} 1 {self._where.sql}"
        values: tuple[Any, ...] = self._where.values
        if most is not None:
            statement, values = statement + " LIMIT ?", (*values, most + 1)
        ids = self._ids(statement, *values)
        return None if most is not None and len(ids) > most else ids

    def _hits(self, ids: np.ndarray, scores: np.ndarray, k: int) -> list[Hit]:
        """The first k of them that the catalog knows and the filter lets pass."""
        rows = self._db.execute(
            f"SELECT {FOUND[self._to]} {ID[self._to]} IN (SELECT value FROM json_each(?)) "
            + self._where.sql,
            (json.dumps(ids.tolist()), *self._where.values),
        )
        known = {row[0]: row[1:] for row in rows}
        hits: list[Hit] = []
        seen = set()
        for number, score in zip(ids.tolist(), scores.tolist(), strict=True):
            with contextlib.suppress(KeyError):
                file, path, start, end, caption = known[number]
                if self._per_file and (caption or file) in seen:
                    continue
                seen.add(caption or file)
                hits.append(Hit(file, path, score, start, end, caption))
                if len(hits) == k:
                    break
        return hits
