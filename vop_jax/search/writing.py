"""The catalog of an index while it is being changed."""

import contextlib
import dataclasses
import json
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vop_jax.data.moments import Span
from vop_jax.search.catalog import FILE, SCHEMA, VERSION, IndexInfo, read_info, stored_info, told


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A row of the table of that name; paths are relative to the indexed folder."""

    id: int
    path: str
    size: int
    mtime: int
    digest: str | None
    reason: str | None


class Catalog:
    """A catalog that is being changed, by one process at a time.

    Changes happen in `with catalog.transaction():`, all of them or none.
    """

    def __init__(self, directory: pathlib.Path):
        self.path = directory / FILE
        with told(self.path):
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA foreign_keys = ON")

    @classmethod
    def open(cls, directory: pathlib.Path, info: IndexInfo) -> "Catalog":
        """The one that is there, or a new one; its `info` becomes this."""
        if stored_info(directory) is None:
            return cls._create(directory, info)
        catalog = cls(directory)
        if catalog.info() != info:
            with catalog.transaction():
                catalog._write_info(info)
        return catalog

    @classmethod
    def _create(cls, directory: pathlib.Path, info: IndexInfo) -> "Catalog":
        catalog = cls(directory)
        with told(catalog.path):
            start = f"PRAGMA user_version = {VERSION};\n" + SCHEMA
            catalog._db.executescript(f"BEGIN IMMEDIATE;\n{start}")
            catalog._write_info(info)
            catalog._db.execute("COMMIT")
        return catalog

    def close(self) -> None:
        """Leaves one file where no reader is at work."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside or none."""
        with told(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def info(self) -> IndexInfo:
        """What the index was made with."""
        return read_info(self._db)

    def _write_info(self, info: IndexInfo) -> None:
        values = dataclasses.asdict(info)
        del values["version"]
        row = ("info", json.dumps(values))
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", row)

    def files(self) -> dict[str, File]:
        """All files by their paths."""
        return {row.path: row for row in self._files("1")}

    def _files(self, where: str, *values: Any) -> list[File]:
        columns = ", ".join(field.name for field in dataclasses.fields(File))
        rows = self._db.execute(f"SELECT {columns} FROM files WHERE {where}", values)
        return [File(*row) for row in rows]

    def twins(self, digest: str) -> list[File]:
        """Readable files with this content."""
        return self._files("digest = ? AND reason IS NULL", digest)

    def add(
        self, path: str, size: int, mtime: int, digest: str | None, spans: Sequence[Span]
    ) -> list[int]:
        """A file with its moments, in the place of what was at this path; their ids."""
        self.remove([path])
        file = self._insert_file(path, size, mtime, digest, None)
        statement = 'INSERT INTO moments (file, start, "end") VALUES (?, ?, ?)'
        return [self._insert(statement, (file, *span)) for span in spans]

    def add_unreadable(self, path: str, size: int, mtime: int, reason: str) -> None:
        """A file that is not tried again before it changes."""
        self.remove([path])
        self._insert_file(path, size, mtime, None, reason)

    def _insert_file(self, *values: Any) -> int:
        columns = "(path, size, mtime, digest, reason)"
        return self._insert(f"INSERT INTO files {columns} VALUES (?, ?, ?, ?, ?)", values)

    def _insert(self, statement: str, values: Sequence[Any]) -> int:
        row = self._db.execute(statement, values).lastrowid
        assert row is not None
        return row

    def move(self, file: File, path: str, size: int, mtime: int) -> None:
        """The same content under another name, or with another date."""
        if path != file.path:
            self.remove([path])
        self._db.execute(
            "UPDATE files SET path = ?, size = ?, mtime = ? WHERE id = ?",
            (path, size, mtime, file.id),
        )

    def remove(self, paths: Iterable[str]) -> None:
        """Forgets files and their moments."""
        self._db.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in paths))

    def doubt(self, moments: np.ndarray) -> None:
        """Has the files of moments done again: their vectors are lost."""
        self._db.execute(
            "UPDATE files SET size = -1, digest = NULL WHERE id IN (SELECT file FROM moments "
            "WHERE id IN (SELECT value FROM json_each(?)))",
            (json.dumps(moments.tolist()),),
        )

    def moments_at(self, paths: Iterable[str]) -> np.ndarray:
        """int64 ids of the moments of the files at these paths."""
        statement = "SELECT id FROM moments WHERE file = (SELECT id FROM files WHERE path = ?)"
        return np.array(
            [row[0] for path in paths for row in self._db.execute(statement, (path,))], np.int64
        )

    def moments(self, file: File) -> list[tuple[int, Span]]:
        """(id, span) of a file's moments."""
        rows = self._db.execute(
            'SELECT id, start, "end" FROM moments WHERE file = ? ORDER BY id', (file.id,)
        )
        return [(number, (start, end)) for number, start, end in rows]

    def ids(self, table: str) -> np.ndarray:
        """int64, sorted: all ids of moments or captions."""
        rows = self._db.execute(f"SELECT id FROM {table} ORDER BY id")
        return np.fromiter((row[0] for row in rows), np.int64)

    def captions(self) -> dict[tuple, int]:
        """{(text, path, start, end): id}."""
        rows = self._db.execute('SELECT text, path, start, "end", id FROM captions')
        return {row[:4]: row[4] for row in rows}

    def add_captions(self, rows: Sequence[tuple]) -> list[int]:
        """(text, path, start, end) each; their ids."""
        statement = 'INSERT INTO captions (text, path, start, "end") VALUES (?, ?, ?, ?)'
        return [self._insert(statement, row) for row in rows]

    def remove_captions(self, ids: Iterable[int]) -> None:
        """Forgets captions."""
        self._db.executemany("DELETE FROM captions WHERE id = ?", ((number,) for number in ids))
