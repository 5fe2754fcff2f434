"""A folder with vectors and a journal of whose they are, changed atomically.

    vectors-G.f32   little-endian float32 [rows, E], only ever appended to
    changes-G.i64   little-endian int64 [changes, 2]: (id, its row), or (id, -1) for deleted
    head.json       which G, and how many rows and changes of it count

A change is appended and synced; renaming a new head.json over the old makes it true, at once.
What lies in the files beyond the head's counts never happened. When most rows are dead the
others are copied to files of the next G; who has the old ones mapped keeps them.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import filelock
import numpy as np

from vop_jax.errors import UserError

VERSION = 1
DELETED = -1
VECTOR, CHANGE = np.dtype("<f4"), np.dtype("<i8")
COPIED = 2**14  # rows at a time in a compaction
ATTEMPTS = 10  # to open what a writer may be compacting


@dataclass(frozen=True)
class Head:
    """The content of head.json."""

    version: int
    dim: int
    generation: int
    rows: int
    changes: int


class Folder:
    """The files of a store; `head` tells what of them counts."""

    def __init__(self, path: str | os.PathLike, dim: int, *, write: bool):
        """Opens a folder, or makes it if it is to be written.

        Raises:
            UserError: no store, one of another width or version, damaged, another writer.
        """
        self.path = Path(path)
        self._lock = self._locked() if write else None
        try:
            if write and not self._file("head.json").exists():
                self._start(Head(VERSION, dim, 0, 0, 0), ())
                self._sync_names()
            self.head, self.vectors, self.changes = self._read(dim)
            if write:
                self._remove_others()
        except OSError as error:
            self.close()
            raise UserError(f"store {self.path}: {_reason(error)}") from None
        except BaseException:
            self.close()
            raise

    @property
    def writable(self) -> bool:
        return self._lock is not None

    def append(self, vectors: np.ndarray, changes: np.ndarray) -> None:
        """Adds vectors [n, E] and changes [m, 2], all or nothing, and on disk.

        Raises:
            UserError: the disk is full or fails; nothing was added.
        """
        head = self.head
        longer = replace(head, rows=head.rows + len(vectors), changes=head.changes + len(changes))
        try:
            _extend(self._vectors(head), head.rows * head.dim * VECTOR.itemsize, [vectors])
            _extend(self._changes(head), head.changes * 2 * CHANGE.itemsize, [changes])
            self._commit(longer)
        except OSError as error:
            self._cut(head)
            raise UserError(f"store {self.path}: {_reason(error)}; nothing was stored") from None
        except BaseException:  # stopped, perhaps after the commit: only reading tells
            self.close()
            raise
        self.vectors = self._map(longer)
        try:
            self._sync_names()
        except OSError as error:
            self.close()
            why = f"{_reason(error)}; open it again to see whether the last change was stored"
            raise UserError(f"store {self.path}: {why}") from None

    def compact(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Keeps the given rows alone, in this order, in new files.

        Raises:
            OSError: the disk is full or fails; all is as before.
        """
        old, vectors = self.head, self.vectors
        head = replace(old, generation=old.generation + 1, rows=len(ids), changes=len(ids))
        starts = range(0, len(rows), COPIED)
        changes = np.stack([ids, np.arange(len(ids))], axis=1).astype(CHANGE)
        try:
            self._start(head, (vectors[rows[i : i + COPIED]] for i in starts), changes)
        except OSError:
            raise
        except BaseException:  # as in `append`
            self.close()
            raise
        self.vectors = self._map(head)
        with contextlib.suppress(OSError):  # no harm if the old files stay
            self._sync_names()
            self._remove_others()

    def refresh(self) -> tuple[bool, np.ndarray]:
        """Reads what was written since; (whether in other files, which are read whole, changes)."""
        old, mapped = self.head, self._mapped
        new = self._read_head(old.dim)
        if new == old and self._identity(new) == mapped:
            return False, np.empty((0, 2), CHANGE)
        self.head, self.vectors, self.changes = self._read(old.dim)
        # A store that was removed and made again counts from 0 again, in files of the same names.
        anew = self.head.generation != old.generation or self._mapped != mapped
        return anew, self.changes if anew else self.changes[old.changes :]

    def _identity(self, head: Head) -> tuple[int, int] | None:
        """Of the file of vectors; no other has it while that is mapped."""
        with contextlib.suppress(FileNotFoundError):
            stat = self._vectors(head).stat()
            return stat.st_dev, stat.st_ino
        return None

    def close(self) -> None:
        """Lets go of the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read(self, dim: int) -> tuple[Head, np.ndarray, np.ndarray]:
        for _ in range(ATTEMPTS):
            head = self._read_head(dim)
            with contextlib.suppress(FileNotFoundError):  # compacted since: read the head again
                self._mapped, vectors = self._identity(head), self._map(head)
                changes = np.fromfile(self._changes(head), CHANGE, 2 * head.changes)
                if len(changes) == 2 * head.changes:
                    return head, vectors, changes.reshape(-1, 2)
                raise UserError(f"{self._changes(head)}: shorter than head.json says; damaged")
        raise UserError(f"store {self.path}: files that head.json names are missing")

    def _read_head(self, dim: int) -> Head:
        path = self._file("head.json")
        try:
            found = json.loads(path.read_bytes())
            version = found["version"]
            head = Head(**found) if version == VERSION else None
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"store {self.path}: no vector store") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not the head of a vector store; damaged") from None
        if head is None:
            raise UserError(f"{path}: version {version}; this program reads version {VERSION}")
        if head.dim != dim:
            raise UserError(f"store {self.path}: holds vectors of {head.dim} numbers, not of {dim}")
        return head

    def _map(self, head: Head) -> np.ndarray:
        if not head.rows:
            return np.empty((0, head.dim), VECTOR)
        try:
            return np.memmap(self._vectors(head), VECTOR, "r", shape=(head.rows, head.dim))
        except ValueError:
            path = self._vectors(head)
            raise UserError(f"{path}: shorter than head.json says; damaged") from None

    def _start(
        self, head: Head, vectors: Iterable[np.ndarray], changes: np.ndarray | None = None
    ) -> None:
        """New files, and the head that makes them the store."""
        try:
            _extend(self._vectors(head), 0, vectors)
            _extend(self._changes(head), 0, [] if changes is None else [changes])
            self._sync_names()
            self._commit(head)
        except OSError:
            for path in (self._vectors(head), self._changes(head)):
                path.unlink(missing_ok=True)
            raise

    def _commit(self, head: Head) -> None:
        """The last step that may fail: `head` counts once it is renamed."""
        partial = self._file("head.json.partial")
        _extend(partial, 0, [json.dumps(asdict(head)).encode()])
        partial.replace(self._file("head.json"))
        self.head = head

    def _sync_names(self) -> None:
        """Makes renamings last through a power cut."""
        names = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)

    def _cut(self, head: Head) -> None:
        """Gives back the room of what does not count."""
        with contextlib.suppress(OSError):
            os.truncate(self._vectors(head), head.rows * head.dim * VECTOR.itemsize)
            os.truncate(self._changes(head), head.changes * 2 * CHANGE.itemsize)
            self._file("head.json.partial").unlink(missing_ok=True)

    def _remove_others(self) -> None:
        """What a kill, or a compaction, left behind."""
        self._cut(self.head)
        kept = {self._vectors(self.head), self._changes(self.head)}
        for pattern in ("vectors-*.f32", "changes-*.i64"):
            for path in set(self.path.glob(pattern)) - kept:
                path.unlink(missing_ok=True)

    def _locked(self) -> filelock.BaseFileLock:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._file("lock"), timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"store {self.path}: another process is writing to it") from None
        except OSError as error:
            raise UserError(f"store {self.path}: {_reason(error)}") from None
        return lock

    def _vectors(self, head: Head) -> Path:
        return self._file(f"vectors-{head.generation}.f32")

    def _changes(self, head: Head) -> Path:
        return self._file(f"changes-{head.generation}.i64")

    def _file(self, name: str) -> Path:
        return self.path / name


def _extend(path: Path, size: int, parts: Iterable[np.ndarray | bytes]) -> None:
    """Cuts a file to `size` bytes, appends to it and syncs it."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        file.truncate(size)
        file.seek(size)
        for part in parts:
            left = memoryview(part).cast("B") if len(part) else memoryview(b"")  # type: ignore[arg-type]
            while left:  # the system writes 2 GB at most at a time, less on a full disk
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the disk"
    return str(error.strerror or error)
