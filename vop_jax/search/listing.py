"""What an index holds, without a query: its files and folders, and the moments of a file."""

import dataclasses
import json
import pathlib
import sqlite3
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search import catalog
from vop_jax.search.query import Date, make_filter
from vop_jax.search.stores.base import VectorStore

if TYPE_CHECKING:
    from vop_jax.video.moments import Segment  # late: a text needs no PyAV

ORDERS = {"newest": "mtime DESC, id DESC", "folder": "path"}


@dataclasses.dataclass(frozen=True)
class ListedFile:
    """A readable file of an index.

    Attributes:
        path: relative to the indexed folder.
        modified: Unix time of its last change.
        end: its length in seconds.
        moments: number of its moments, without the whole clip.
    """

    id: int
    path: str
    modified: float
    end: float
    moments: int


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The moments before and after a moment of a file.

    Attributes:
        number: of the moment, from 1; 0: the whole clip.
        count: number of moments, without the whole clip.
        previous, next: None where there is none; of the whole clip the first one is the next.
    """

    number: int
    count: int
    previous: "Segment | None"
    next: "Segment | None"


class Listing:
    """What a catalog in a folder lists; a part of `Index`."""

    directory: pathlib.Path

    def store(self, target: str) -> VectorStore:
        """The vectors of a target."""
        raise NotImplementedError

    def list_files(
        self,
        order: str,
        offset: int,
        limit: int,
        *,
        folder: str | None = None,
        since: Date = None,
        until: Date = None,
    ) -> tuple[int, list[ListedFile]]:
        """(number of files that pass the filter, some of them in an order of `ORDERS`).

        Raises:
            UserError: a filter is wrong; see `make_filter`.
        """
        condition, values = make_filter(folder, since, until).sql()
        where = f"FROM files WHERE reason IS NULL {condition}"
        # The first moment of a file is the whole clip.
        end = 'SELECT "end" FROM moments WHERE file = files.id ORDER BY id LIMIT 1'
        moments = "SELECT COUNT(*) - 1 FROM moments WHERE file = files.id"
        columns = f"id, path, mtime / 1e9, ({end}), ({moments})"
        page = f"SELECT {columns} {where} ORDER BY {ORDERS[order]} LIMIT ? OFFSET ?"
        with catalog.reading(self.directory) as db:
            total = db.execute(f"SELECT COUNT(*) {where}", values).fetchone()[0]
            return total, [ListedFile(*row) for row in db.execute(page, (*values, limit, offset))]

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        """The first folders, in order of their names, whose path continues a prefix.

        Only the next part of a path is listed: "20" may give "2025" and "2026", "2026/" its
        folders.
        """
        parent = prefix[: prefix.rfind("/") + 1]
        # Ranges of the index of paths: the files below a folder are passed over, not read.
        statement = """SELECT path FROM files WHERE path >= ? AND path < ? AND reason IS NULL
                       AND instr(substr(path, ?), '/') ORDER BY path LIMIT 1"""
        folders: list[str] = []
        first, last = prefix, prefix + "\U0010ffff"
        with catalog.reading(self.directory) as db:
            while len(folders) < limit:
                row = db.execute(statement, (first, last, len(parent) + 1)).fetchone()
                if row is None:
                    break
                folders.append(row[0][: row[0].index("/", len(parent))])
                first = folders[-1] + "0"  # the character after "/"
        return folders

    def modified(self, ids: Iterable[int]) -> tuple[str, dict[int, float]]:
        """(the indexed folder, {id of a file: Unix time of its last change})."""
        with catalog.reading(self.directory) as db:
            statement = (
                "SELECT id, mtime / 1e9 FROM files WHERE id IN (SELECT value FROM json_each(?))"
            )
            times = dict(db.execute(statement, (json.dumps(sorted(set(ids))),)))
            return catalog.read_info(db).folder, times

    def neighbours(self, file_id: int, start: float, end: float) -> Neighbours:
        """The moments before and after one of them.

        Raises:
            UserError: the file has no such moment.
        """
        with catalog.reading(self.directory) as db:
            _, *rows = _moments(db, file_id, start, end)
        return neighbours_among([row[1:] for row in rows], (start, end))

    def moment_vector(self, file_id: int, start: float, end: float) -> np.ndarray:
        """float32 [E] of a moment.

        Raises:
            UserError: the file has no such moment.
        """
        store = self.store("videos")
        with catalog.reading(self.directory) as db:
            rows = _moments(db, file_id, start, end)
            number = next(row[0] for row in rows if row[1:] == (start, end))
            return store.snapshot(db).get(np.array([number], np.int64))[0]


def neighbours_among(moments: Iterable["Segment"], own: "Segment") -> Neighbours:
    """Of a moment, or of the whole clip, among the moments of a file."""
    parts = sorted(moments)
    number = parts.index(own) + 1 if own in parts else 0
    before = parts[number - 2] if number > 1 else None
    return Neighbours(number, len(parts), before, parts[number] if number < len(parts) else None)


def _moments(
    db: sqlite3.Connection, file_id: int, start: float, end: float
) -> list[tuple[int, float, float]]:
    """(id, start, end) of the moments of a file, the whole clip first."""
    statement = 'SELECT id, start, "end" FROM moments WHERE file = ? ORDER BY id'
    rows = db.execute(statement, (file_id,)).fetchall()
    if (start, end) not in [row[1:] for row in rows]:
        raise UserError(f"file {file_id}: no moment from {start:g} to {end:g} s in the index")
    return rows
