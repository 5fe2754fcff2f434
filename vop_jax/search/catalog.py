"""The catalog of an index: which files there are, and which vector is which moment of which.

It is the truth: a vector that it does not know is not there. It is one SQLite file, in WAL mode,
so that readers see a whole state while a writer runs.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vop_jax.data.moments import Span
from vop_jax.errors import UserError

FILE = "catalog.sqlite"
VERSION = 1

SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE files (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path TEXT NOT NULL UNIQUE,   -- relative to the indexed folder, with /
    size INTEGER NOT NULL,
    mtime INTEGER NOT NULL,      -- nanoseconds
    digest TEXT,                 -- of the content
    reason TEXT                  -- why it could not be read
);
CREATE INDEX files_mtime ON files (mtime);
CREATE INDEX files_digest ON files (digest);
CREATE INDEX files_reason ON files (path) WHERE reason IS NOT NULL;
-- Ids are those of the vectors; AUTOINCREMENT never gives one a second time.
CREATE TABLE moments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    file INTEGER NOT NULL REFERENCES files (id) ON DELETE CASCADE,
    start REAL NOT NULL,
    "end" REAL NOT NULL
);
CREATE INDEX moments_file ON moments (file);
CREATE TABLE captions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    text TEXT NOT NULL,
    path TEXT NOT NULL,          -- as files.path; '' where no video is named
    start REAL NOT NULL,
    "end" REAL NOT NULL,
    UNIQUE (text, path, start, "end")
);
CREATE INDEX captions_path ON captions (path);
"""


@dataclasses.dataclass(frozen=True)
class IndexInfo:
    """What an index was made with.

    Attributes:
        version: of the format.
        clip, prompts: files; prompts is "" for plain CLIP.
        clip_name, clip_fingerprint, prompts_fingerprint, method, frames: see `Retriever`.
        dim: E.
        window, stride: seconds of the moments; 0: whole clips alone.
        folder: absolute.
        store: URI of the vectors; "": in the index's own folder.
    """

    version: int
    clip: str
    clip_fingerprint: str
    clip_name: str
    prompts: str
    prompts_fingerprint: str
    method: str
    frames: int
    dim: int
    window: float
    stride: float
    folder: str
    store: str


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A row of the table of that name; paths are relative to the indexed folder."""

    id: int
    path: str
    size: int
    mtime: int
    digest: str | None
    reason: str | None


def stored_info(directory: str | os.PathLike) -> IndexInfo | None:
    """What an index was made with; None where there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    path = pathlib.Path(directory) / FILE
    if not path.is_file():
        return None
    with told(path), contextlib.closing(_connect(path)) as db:
        if not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return None  # killed in its first moment
        _check_version(db, path)
        return read_info(db)


@contextlib.contextmanager
def reading(directory: str | os.PathLike) -> Iterator[sqlite3.Connection]:
    """One state of the catalog, whatever a writer does meanwhile.

    Raises:
        UserError: there is no index, it is damaged, or of a newer version.
    """
    path = pathlib.Path(directory) / FILE
    if not path.is_file():
        raise UserError(f"{directory}: no index; make one with python -m vop_jax.search index")
    with told(path), contextlib.closing(_connect(path)) as db:
        db.execute("BEGIN")
        _check_version(db, path)
        yield db


def _connect(path: pathlib.Path) -> sqlite3.Connection:
    address = path.absolute().as_uri() + "?mode=ro"
    # Where nothing can be written SQLite cannot coordinate with a writer, and there is none.
    if not os.access(path.parent, os.W_OK) and not pathlib.Path(f"{path}-wal").exists():
        address += "&immutable=1"
    return sqlite3.connect(address, uri=True, isolation_level=None, timeout=30)


@contextlib.contextmanager
def told(path: pathlib.Path) -> Iterator[None]:
    """SQLite's errors as others are: a full disk is an OSError, a damaged file the user's."""
    try:
        yield
    except sqlite3.Error as error:
        if "disk is full" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path)) from None
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # our mistake
        raise UserError(f"{path}: not a readable catalog of an index ({error})") from None


def _check_version(db: sqlite3.Connection, path: pathlib.Path) -> None:
    """Raises UserError for a catalog that a newer program wrote, or none of ours."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise UserError(
            f"{path.parent}: an index of version {version}, this program knows up to {VERSION}; "
            "use a newer one, or give another --index"
        )
    if version < 1:
        raise UserError(f"{path}: not the catalog of an index")


def read_info(db: sqlite3.Connection) -> IndexInfo:
    """What the index was made with."""
    values = dict(db.execute("SELECT key, value FROM about"))
    version = db.execute("PRAGMA user_version").fetchone()[0]
    return IndexInfo(version=version, **json.loads(values["info"]))


def generation(db: sqlite3.Connection) -> int:
    """Grows with every change."""
    return int(db.execute("SELECT value FROM about WHERE key = 'generation'").fetchone()[0])


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
            catalog._db.execute("INSERT INTO about VALUES ('generation', '0')")
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
                self._db.execute(
                    "UPDATE about SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'"
                )
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
