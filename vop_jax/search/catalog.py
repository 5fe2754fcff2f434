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
from collections.abc import Iterator

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

    @property
    def model(self) -> tuple:
        """What its vectors are by, and where they are."""
        prompts = self.prompts_fingerprint, self.method
        return self.clip_fingerprint, *prompts, self.frames, self.dim, self.store


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
        code = getattr(error, "sqlite_errorcode", 0)  # Python's own errors have none
        if code & 0xFF == sqlite3.SQLITE_IOERR:  # also of a full disk
            raise UserError(f"{path.parent}: cannot be read or written ({error})") from None
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
