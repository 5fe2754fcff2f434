"""The catalog of an index: which files there are, and which vector is which moment of which.

It is the truth, and its transaction the only commit: a vector that it does not name is not there.
It is one SQLite file with a rollback journal. Readers see whole states while a writer works, leave
no files of SQLite behind, and hold a commit up until they have read: nothing that a state names
goes away under them.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import secrets
import shlex
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from vop_jax.errors import UserError
from vop_jax.search.stores.base import TABLES, VectorStore
from vop_jax.search.stores.open import open_store
from vop_jax.video.moments import Segment

FILE = "catalog.sqlite"
VERSION = 2
WAIT = 60.0  # seconds for a commit, or for searches that are under way

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
-- The id of a moment or a caption is that of its vector.
CREATE TABLE moments (
    id INTEGER PRIMARY KEY,
    file INTEGER NOT NULL REFERENCES files (id) ON DELETE CASCADE,
    start REAL NOT NULL,
    "end" REAL NOT NULL
);
CREATE INDEX moments_file ON moments (file);
CREATE TABLE captions (
    id INTEGER PRIMARY KEY,
    text TEXT NOT NULL,
    path TEXT NOT NULL,          -- as files.path; '' where no video is named
    start REAL NOT NULL,
    "end" REAL NOT NULL,
    UNIQUE (text, path, start, "end")
);
CREATE INDEX captions_path ON captions (path);
CREATE TABLE vectors (
    target TEXT PRIMARY KEY,     -- moments or captions
    heap TEXT NOT NULL,          -- the file that holds them, see heap.py
    count INTEGER NOT NULL,      -- appended so far: the id of the next
    sums BLOB NOT NULL           -- CRC-32 of each block of the heap, little-endian
) WITHOUT ROWID;
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

    @property
    def model(self) -> tuple:
        """What its vectors are by, and where they are."""
        prompts = self.prompts_fingerprint, self.method
        return self.clip_fingerprint, *prompts, self.frames, self.dim, self.store


def stored_info(directory: str | os.PathLike) -> IndexInfo | None:
    """What an index was made with; None where there is none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = pathlib.Path(directory) / FILE
    if not path.is_file():
        return None
    with sqlite_errors(path), contextlib.closing(connect(path)) as db:
        if not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return None  # killed in its first moment
        _check_version(db, path)
        return read_info(db)


@contextlib.contextmanager
def reading(directory: str | os.PathLike) -> Iterator[sqlite3.Connection]:
    """One state of the catalog, whatever a writer does meanwhile.

    Raises:
        UserError: there is no index, it is damaged, or of another version.
    """
    path = pathlib.Path(directory) / FILE
    if not path.is_file():
        raise UserError(f"{directory}: no index; make one with python -m vop_jax.search index")
    with sqlite_errors(path), contextlib.closing(connect(path)) as db:
        db.execute("PRAGMA query_only = ON")
        db.execute("BEGIN")
        _check_version(db, path)
        yield db


def connect(path: pathlib.Path, mode: str = "rw") -> sqlite3.Connection:
    """A connection; `mode` is "rw" or, to make a file that is not there, "rwc".

    "rw" also to read: a commit that was killed is rolled back by who comes next. Where nothing
    can be written SQLite reads.
    """
    address = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(address, uri=True, isolation_level=None, timeout=WAIT)


@contextlib.contextmanager
def sqlite_errors(path: pathlib.Path) -> Iterator[None]:
    """SQLite's errors as others are: a full disk is an OSError, a damaged file the user's."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)  # Python's own errors have none
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # our mistake
        if code & 0xFF == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path)) from None
        if code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):  # also of a full disk
            raise UserError(f"{path.parent}: cannot be read or written ({error})") from None
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UserError(f"{path.parent}: another process keeps it locked") from None
        if code == sqlite3.SQLITE_READONLY_ROLLBACK:
            why = "a writer was killed here; search it once where it can be written"
            raise UserError(f"{path.parent}: {why}") from None
        if code & 0xFF == sqlite3.SQLITE_READONLY:
            raise UserError(f"{path}: may not be written") from None
        raise damaged(path, str(error)) from None


def damaged(path: pathlib.Path, why: str) -> UserError:
    """Of a catalog that nothing can be read from."""
    return UserError(f"{path}: damaged ({why}); remove {path.parent} and index the videos again")


def _check_version(db: sqlite3.Connection, path: pathlib.Path) -> None:
    """Raises UserError for a catalog that another program wrote, or none of ours."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    own = f"{path.parent}: an index of version {version}, this program reads version {VERSION}"
    if version > VERSION:
        raise UserError(f"{own}; use a newer program, or give another --index")
    if version < 1:
        raise damaged(path, "not the catalog of an index")
    info = read_info(db)
    names = ("clip", "prompts", "window", "stride", "store")
    options = [f"--{name}={value}" for name in names if (value := getattr(info, name))]
    again = shlex.join([info.folder, *options, f"--index={path.parent}"])
    raise UserError(f"{own}; remove it, then: python -m vop_jax.search index {again}")


def read_info(db: sqlite3.Connection) -> IndexInfo:
    """What the index was made with.

    Raises:
        UserError: this is damaged.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    try:
        values = dict(db.execute("SELECT key, value FROM about"))
        return IndexInfo(version=version, **json.loads(values["info"]))
    except (KeyError, TypeError, ValueError):
        path = pathlib.Path(db.execute("PRAGMA database_list").fetchone()[2])
        raise damaged(path, "what it was made with cannot be read") from None


# SQLite has no checksums. When a writer is done it writes that of the whole file into a field of
# the header that is a program's own; 0 says that a writer is at work, or was killed.


def seal_of(db: sqlite3.Connection) -> int:
    """The checksum of a catalog, but for the fields of the header that writing it changes."""
    pages = db.serialize()
    head = bytearray(pages[:100])
    head[24:28] = head[68:72] = bytes(4)  # counter of changes, this checksum
    head[92:100] = bytes(8)  # the counter again, SQLite's version
    return zlib.crc32(memoryview(pages)[100:], zlib.crc32(head)) & 0x7FFFFFFF or 1


def check(db: sqlite3.Connection, path: pathlib.Path) -> None:
    """Raises UserError where bytes of the file are not those that were written.

    While a writer is at work, or after it was killed, only where that makes them unreadable.
    """
    seal = db.execute("PRAGMA application_id").fetchone()[0]
    if seal and seal != seal_of(db):
        raise damaged(path, "its bytes do not have their checksum")
    if not seal and (said := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise damaged(path, said.splitlines()[-1])


@dataclasses.dataclass(frozen=True, slots=True)
class IndexedFile:
    """A row of the table of that name; paths are relative to the indexed folder."""

    id: int
    path: str
    size: int
    mtime: int
    digest: str | None
    reason: str | None


class Catalog:
    """A catalog that is being changed, with its vectors, by one process at a time.

    Changes happen in `with catalog.transaction():`, all of them or none.
    """

    def __init__(self, path: pathlib.Path, stores: dict[str, VectorStore]):
        self.path, self._stores = path, stores
        self._db = connect(path, "rwc")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA cache_spill = OFF")  # it would lock readers out before a commit

    @classmethod
    def open(cls, directory: str | os.PathLike, info: IndexInfo) -> "Catalog":
        """The one that is there, or a new one; its `info` becomes this.

        Raises:
            UserError: it is damaged; a database of vectors does not answer, or has another's.
        """
        path = pathlib.Path(directory) / FILE
        new = stored_info(directory) is None
        # Before there is a catalog, which would bind it to a store that is not there.
        with contextlib.ExitStack() as stack, sqlite_errors(path):
            stores = {}
            for table in TABLES.values():
                stores[table] = open_store(directory, info, table, write=True, new=new)
                stack.callback(stores[table].close)
            opened = cls(path, stores)
            stack.callback(opened._db.close)
            if new:
                opened._create(info)
            else:
                opened._check(info)
            stack.pop_all()
        return opened

    def _create(self, info: IndexInfo) -> None:
        token = secrets.token_hex(8)  # no heap ever has another's name
        with self.transaction():
            for statement in SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
            for table in self._stores:
                row = (table, f"{token}-{table}-0.f32", 0, b"")
                self._db.execute("INSERT INTO vectors VALUES (?, ?, ?, ?)", row)
            self._write_info(info)

    def _check(self, info: IndexInfo) -> None:
        """Finds damage; of files and captions whose vectors are lost nothing stays known."""
        check(self._db, self.path)
        if read_info(self._db) != info:
            with self.transaction():
                self._write_info(info)
        for table, store in self._stores.items():
            lost = store.lost(self._db)
            if not len(lost):
                continue
            where = "files WHERE id IN (SELECT file FROM moments WHERE id = ?)"
            where = where if table == "moments" else "captions WHERE id = ?"
            logging.warning("%d vectors of %s are lost; they are made again", len(lost), table)
            with self.transaction():
                rows = ((number,) for number in lost.tolist())
                self._db.executemany(f"DELETE FROM {where}", rows)
                store.compact(self._db)
            store.clean(self._db)

    def compact(self) -> None:
        """Gives back the room of vectors that nothing names any more."""
        for store in self._stores.values():
            if store.is_sparse(self._db):
                with contextlib.suppress(OSError), self.transaction():  # no room: they stay
                    store.compact(self._db)
            store.clean(self._db)

    def close(self) -> None:
        """Lets go of it, sealed if there is room for that."""
        with contextlib.suppress(sqlite3.Error):
            if not self._db.execute("PRAGMA application_id").fetchone()[0]:
                self._db.execute(f"PRAGMA application_id = {seal_of(self._db)}")
        self._db.close()
        for store in self._stores.values():
            store.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside or none."""
        with sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("PRAGMA application_id = 0")  # see seal_of
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _write_info(self, info: IndexInfo) -> None:
        values = dataclasses.asdict(info)
        del values["version"]
        row = ("info", json.dumps(values))
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", row)

    def files(self) -> dict[str, IndexedFile]:
        """All files by their paths."""
        return {row.path: row for row in self._files("1")}

    def _files(self, where: str, *values: Any) -> list[IndexedFile]:
        columns = ", ".join(field.name for field in dataclasses.fields(IndexedFile))
        rows = self._db.execute(f"SELECT {columns} FROM files WHERE {where}", values)
        return [IndexedFile(*row) for row in rows]

    def twins(self, digest: str) -> list[IndexedFile]:
        """Readable files with this content."""
        return self._files("digest = ? AND reason IS NULL", digest)

    def store_vectors(self, table: str, vectors: np.ndarray) -> list[int]:
        """Puts vectors [N, E] where the transaction's commit makes them count; their ids."""
        return self._stores[table].append(self._db, vectors).tolist()

    def vectors(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [N, E] of moments."""
        return self._stores["moments"].snapshot(self._db).get(np.array(ids, np.int64))

    def add(
        self,
        path: str,
        size: int,
        mtime: int,
        digest: str,
        spans: Sequence[Segment],
        ids: list[int],
    ) -> None:
        """A file with its moments, in the place of what was at this path."""
        self.remove([path])
        file = self._insert_file(path, size, mtime, digest, None)
        rows = ((number, file, *span) for number, span in zip(ids, spans, strict=True))
        self._db.executemany("INSERT INTO moments VALUES (?, ?, ?, ?)", rows)

    def add_unreadable(self, path: str, size: int, mtime: int, reason: str) -> None:
        """A file that is not tried again before it changes."""
        self.remove([path])
        self._insert_file(path, size, mtime, None, reason)

    def _insert_file(self, *values: Any) -> int:
        columns = "(path, size, mtime, digest, reason)"
        statement = f"INSERT INTO files {columns} VALUES (?, ?, ?, ?, ?)"
        row = self._db.execute(statement, values).lastrowid
        assert row is not None
        return row

    def move(self, file: IndexedFile, path: str, size: int, mtime: int) -> None:
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

    def moments(self, file: IndexedFile) -> list[tuple[int, Segment]]:
        """(id, span) of a file's moments."""
        rows = self._db.execute(
            'SELECT id, start, "end" FROM moments WHERE file = ? ORDER BY id', (file.id,)
        )
        return [(number, (start, end)) for number, start, end in rows]

    def captions(self) -> dict[tuple, int]:
        """{(text, path, start, end): id}."""
        rows = self._db.execute('SELECT text, path, start, "end", id FROM captions')
        return {row[:4]: row[4] for row in rows}

    def add_captions(self, rows: Sequence[tuple], vectors: np.ndarray) -> None:
        """(text, path, start, end) each, and their vectors [N, E]."""
        ids = self.store_vectors("captions", vectors)
        filled = ((number, *row) for number, row in zip(ids, rows, strict=True))
        self._db.executemany("INSERT INTO captions VALUES (?, ?, ?, ?, ?)", filled)

    def remove_captions(self, ids: Iterable[int]) -> None:
        """Forgets captions."""
        self._db.executemany("DELETE FROM captions WHERE id = ?", ((number,) for number in ids))
