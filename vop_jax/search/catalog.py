"""The catalog of an index: its files, and which vector is which moment of which file.

The catalog is the only truth, and its transaction the only commit: a vector that it does not name
does not exist. It is one SQLite file with a rollback journal. Readers see whole states while a
writer works, and leave no files of SQLite behind. A commit waits until they have read, so that
nothing that their state names disappears meanwhile.
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
WAIT = 60.0  # seconds for a commit, or for running searches
PASSING = (  # errors of SQLite that are no damage
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
)

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
    target TEXT PRIMARY KEY,     -- moments, captions or frames
    heap TEXT NOT NULL,          -- the file that holds them, see heap.py
    count INTEGER NOT NULL,      -- appended so far: the id of the next
    sums BLOB NOT NULL           -- CRC-32 of each block of the heap, little-endian
) WITHOUT ROWID;
"""

# In indexes that keep the vectors of frames.
FRAMES_SCHEMA = """
CREATE TABLE frames (
    id INTEGER PRIMARY KEY,      -- the row of its heap that has the F vectors of a moment
    moment INTEGER NOT NULL REFERENCES moments (id) ON DELETE CASCADE ON UPDATE CASCADE,
    seconds BLOB NOT NULL        -- of the F frames in the file, little-endian float32
);
CREATE INDEX frames_moment ON frames (moment);
"""


@dataclasses.dataclass(frozen=True)
class IndexInfo:
    """What an index was made with.

    Attributes:
        version: of the format.
        clip, prompts: files; prompts is "" for plain CLIP.
        clip_name, clip_fingerprint, prompts_fingerprint, method, frames: see `Retriever`.
        dim: E.
        window, stride: seconds of the moments; 0: whole clips, and shots, only.
        folder: of the videos, absolute.
        store: URI of the vectors; "": in the index's own folder.
        dtype: of the model's matrix products.
        shots: whether the moments are the shots of the files.
        keep_frames: whether the vectors of their frames are kept, too.
        vector_index: of an index on a server, see `collection.vector_index`.
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
    dtype: str = "float32"  # that of indexes which do not say it
    shots: bool = False
    keep_frames: bool = False
    vector_index: str = "FLAT"

    @property
    def model(self) -> tuple:
        """Which model made the vectors, and where they are."""
        prompts = self.prompts_fingerprint, self.method
        return self.clip_fingerprint, *prompts, self.frames, self.dim, self.store


@dataclasses.dataclass(frozen=True, slots=True)
class IndexedFile:
    """A row of the table `files`; the path is relative to the indexed folder."""

    id: int
    path: str
    size: int
    mtime: int
    digest: str | None
    reason: str | None


FILE_COLUMNS = ", ".join(field.name for field in dataclasses.fields(IndexedFile))


def stored_info(directory: str | os.PathLike) -> IndexInfo | None:
    """What an index was made with; None where there is no index.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = pathlib.Path(directory) / FILE
    if not path.is_file():
        return None
    with sqlite_errors(path), contextlib.closing(connect(path)) as db:
        if not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return None  # its first writer was killed before its first commit
        _check_version(db, path)
        return read_info(db)


@contextlib.contextmanager
def reading(directory: str | os.PathLike) -> Iterator[sqlite3.Connection]:
    """A connection to one state of the catalog, which writers do not change.

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
    """Opens the file; with mode "rwc" creates it.

    Readers open it with "rw", too: the first connection after a killed commit rolls it back.
    SQLite still reads where nothing can be written.
    """
    address = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(address, uri=True, isolation_level=None, timeout=WAIT)


@contextlib.contextmanager
def sqlite_errors(path: pathlib.Path) -> Iterator[None]:
    """Raises OSError for a full disk, and UserError where SQLite cannot use the file."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # mistakes of this program
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)  # Python's own errors have none
        kind = code & 0xFF
        if kind == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path)) from None
        if code == sqlite3.SQLITE_READONLY_ROLLBACK:
            reason = "a writer was killed here; search it once where it can be written"
            raise UserError(f"{path.parent}: {reason}") from None
        if kind in PASSING:
            raise UserError(f"{path.parent}: cannot be read or written ({error})") from None
        raise _damaged(path, str(error)) from None


def _damaged(path: pathlib.Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged ({reason}); remove {path.parent} and index the videos again")


def _check_version(db: sqlite3.Connection, path: pathlib.Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    message = f"{path.parent}: an index of version {version}, this program reads version {VERSION}"
    if version > VERSION:
        raise UserError(f"{message}; use a newer program, or give another --index")
    if version < 1:
        raise _damaged(path, "not the catalog of an index")
    info = read_info(db)
    names = ("clip", "prompts", "window", "stride", "store")
    options = [f"--{name}={value}" for name in names if (value := getattr(info, name))]
    options += ["--shots"] * info.shots + ["--keep_frames"] * info.keep_frames
    command = shlex.join([info.folder, *options, f"--index={path.parent}"])
    raise UserError(f"{message}; remove it, then: python -m vop_jax.search index {command}")


def read_info(db: sqlite3.Connection) -> IndexInfo:
    """What the index was made with.

    Raises:
        UserError: this row is damaged.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    try:
        row = db.execute("SELECT value FROM about WHERE key = 'info'").fetchone()
        return IndexInfo(version=version, **json.loads(row[0]))
    except (TypeError, ValueError):
        path = pathlib.Path(db.execute("PRAGMA database_list").fetchone()[2])
        raise _damaged(path, "its description cannot be read") from None


def check(db: sqlite3.Connection, path: pathlib.Path) -> None:
    """Raises UserError where bytes of the file have changed since they were written.

    SQLite has no checksums. A writer that is done puts one of the whole file into the field of the
    header that belongs to the application. While it is 0, a writer is at work or was killed; then
    only damage to SQLite's own structures is found.
    """
    checksum = db.execute("PRAGMA application_id").fetchone()[0]
    if checksum and checksum != checksum_of(db):
        raise _damaged(path, "its bytes do not have their checksum")
    if not checksum and (result := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise _damaged(path, result.splitlines()[-1])


def checksum_of(db: sqlite3.Connection) -> int:
    """Of the file without the fields of its header that writing the checksum changes."""
    pages = db.serialize()
    head = bytearray(pages[:100])
    head[24:28] = head[68:72] = bytes(4)  # counter of changes, this checksum
    head[92:100] = bytes(8)  # the counter again, SQLite's version
    return zlib.crc32(memoryview(pages)[100:], zlib.crc32(head)) & 0x7FFFFFFF or 1
