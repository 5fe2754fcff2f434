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
import shlex
import sqlite3
import zlib
from collections.abc import Iterator

from vop_jax.errors import UserError

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
