"""The default store: vectors in a memory-mapped file, searched exactly.

A heap is a file of little-endian float32 rows [N, E], and the id of a vector is its row. Rows are
appended and synced before the catalog's transaction commits how many there are; what lies behind
those never happened. The catalog has a CRC-32 of each block of rows, too. When most rows are dead
the others are copied to another heap, which one more commit puts in the place of the first.
"""

import contextlib
import errno
import os
import pathlib
import sqlite3
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.stores.base import (
    NO_ID,
    checked_ids,
    checked_k,
    checked_vectors,
    distinct,
    named_ids,
)

if TYPE_CHECKING:
    import jax

VECTOR, SUM = np.dtype("<f4"), np.dtype("<u4")
BLOCK = 1024  # rows under one checksum
SLACK = 1024  # dead rows that are not worth a compaction
COPIED = 16 * BLOCK  # rows at a time in a compaction


class Extent(NamedTuple):
    """What counts of a heap, in one state of the catalog.

    Attributes:
        name: of the file; none is ever used twice.
        rows: of it.
        sums: uint32, CRC-32 of each block of `BLOCK` rows, of what there is of the last one.
    """

    name: str
    rows: int
    sums: np.ndarray


class Rows:
    """The `Snapshot` of a heap; its file may be unlinked meanwhile."""

    def __init__(self, path: pathlib.Path, dim: int, extent: Extent, known: "Rows | None" = None):
        """Maps it.

        Args:
            known: an earlier state, whose blocks are not read again to compare their sums.

        Raises:
            UserError: the file is gone or too short.
        """
        self.extent, self._path, self._sums = extent, path, extent.sums
        # What the file's blocks really have; -1 of those that were not read yet.
        self._computed = np.full(len(extent.sums), -1, np.int64)
        if known is not None and known._path == path:
            shared = min(len(self._computed), len(known._computed))
            self._computed[:shared] = known._computed[:shared]
        self.vectors = np.empty((0, dim), VECTOR)
        try:
            if extent.rows:
                self.vectors = np.memmap(path, VECTOR, "r", shape=(extent.rows, dim))
        except FileNotFoundError:
            raise self._damaged("is gone") from None
        except ValueError:
            raise self._damaged("is too short") from None

    def __len__(self) -> int:
        return len(self.vectors)

    def check(self, rows: np.ndarray | None = None) -> None:
        """Compares rows [N], or all, with their checksums; each block is read for that once.

        Raises:
            UserError: other bytes than were written.
        """
        if len(bad := self.bad_blocks(rows)):
            first = bad[0] * BLOCK
            raise self._damaged(f"has other bytes than were written, first near row {first}")

    def bad_blocks(self, rows: np.ndarray | None = None) -> np.ndarray:
        """int64 numbers of the blocks that do not have their checksums."""
        todo = np.flatnonzero(self._computed != self._sums)
        if rows is not None and len(todo):
            todo = np.intersect1d(todo, rows // BLOCK)
        if len(todo):
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                self._computed[todo] = list(pool.map(self._sum, todo.tolist()))
        return todo[self._computed[todo] != self._sums[todo]]

    def _sum(self, block: int) -> int:
        return zlib.crc32(_bytes(self.vectors[block * BLOCK : (block + 1) * BLOCK]))

    def get(self, ids: np.ndarray) -> np.ndarray:
        """float32 [N, E] of ids [N]."""
        ids = checked_ids(ids)
        if len(ids) and ids.max() >= len(self):
            raise UserError(f"store {self._path.parent}: has no id {ids.max()}")
        self.check(ids)
        return np.array(self.vectors[ids], np.float32)

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k of all or of the allowed ids, see `base.Snapshot`."""
        from vop_jax.search.stores import top_k

        queries, k = checked_vectors(queries, self.vectors.shape[1], "queries"), checked_k(k)
        rows = None if allowed is None else distinct(checked_ids(allowed))
        if rows is not None:
            rows = rows[rows < len(self)]
        ids = np.full((len(queries), k), NO_ID, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = min(k, len(self) if rows is None else len(rows))
        if found and len(queries):
            self.check(rows)
            if self._placed is not None:
                best = top_k.on_device(self._placed, rows, queries, found)
            else:
                best = top_k.on_host(self.vectors, rows, queries, found)
            ids[:, :found], scores[:, :found] = best
        return ids, scores

    @cached_property
    def _placed(self) -> "jax.Array | None":
        """The vectors on a GPU or TPU, put there for the first search; else None."""
        from vop_jax.search.stores import top_k

        self.check()
        return top_k.place(self.vectors)

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self._path}: {why}; index again (python -m vop_jax.search index --index=DIR), "
            "which makes the lost vectors anew"
        )


class Heap:
    """A `VectorStore` in a folder. Any number of threads may search it."""

    def __init__(self, folder: str | os.PathLike, dim: int, table: str, *, write: bool):
        self._folder, self._dim, self._table = pathlib.Path(folder), dim, table
        self._lock = threading.Lock()
        self._rows: Rows | None = None
        if write:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"store {folder}: {error.strerror}") from None

    def snapshot(self, db: sqlite3.Connection) -> Rows:
        """What there is in the state that a connection reads."""
        extent = self._extent(db)
        with self._lock:
            rows = self._rows
            if rows is None or rows.extent[:2] != extent[:2]:
                self._rows = rows = Rows(self._folder / extent.name, self._dim, extent, rows)
            return rows

    def append(self, db: sqlite3.Connection, vectors: np.ndarray) -> np.ndarray:
        """Writes and syncs rows behind those that count; the caller's commit makes them count."""
        vectors = np.ascontiguousarray(checked_vectors(vectors, self._dim), VECTOR)
        name, count, sums = self._extent(db)
        begun = -count % BLOCK  # rows that the last block still takes
        first = [zlib.crc32(_bytes(vectors[:begun]), int(sums[-1]))] if begun else []
        sums = np.concatenate([sums[: len(sums) - len(first)], first, _sums(vectors[begun:])])
        self._write(name, count, [vectors])
        self._name(db, Extent(name, count + len(vectors), sums))
        return np.arange(count, count + len(vectors))

    def lost(self, db: sqlite3.Connection) -> np.ndarray:
        """int64 ids that the catalog names and whose vectors are damaged or gone."""
        rows, ids = self._whole_blocks(self._extent(db)), named_ids(db, self._table)
        return ids[(ids >= len(rows)) | np.isin(ids // BLOCK, rows.bad_blocks())]

    def _whole_blocks(self, extent: Extent) -> Rows:
        """What a file has of an extent, whatever became of it."""
        path, count = self._folder / extent.name, extent.rows
        size = path.stat().st_size if path.exists() else 0
        if (there := size // (VECTOR.itemsize * self._dim)) < count:
            count = there // BLOCK * BLOCK
        return Rows(path, self._dim, Extent(extent.name, count, extent.sums[: -(-count // BLOCK)]))

    def is_sparse(self, db: sqlite3.Connection) -> bool:
        """Whether more than half of the rows are dead."""
        (alive,) = db.execute(f"SELECT COUNT(*) FROM {self._table}").fetchone()
        return self._extent(db).rows > 2 * alive + SLACK

    def compact(self, db: sqlite3.Connection) -> None:
        """Copies the rows that the catalog names to another heap, in their order."""
        extent, ids = self._extent(db), named_ids(db, self._table)
        vectors = self._whole_blocks(extent).vectors
        stem, _, number = extent.name.removesuffix(".f32").rpartition("-")
        name, sums = f"{stem}-{int(number) + 1}.f32", []

        def parts() -> Iterable[np.ndarray]:
            for start in range(0, len(ids), COPIED):
                part = np.ascontiguousarray(vectors[ids[start : start + COPIED]])
                sums.append(_sums(part))
                yield part

        self._write(name, 0, parts())
        # Upwards: a row's new place is its own or that of one which has moved already.
        moved = ((new, old) for new, old in enumerate(ids.tolist()) if new != old)
        db.executemany(f"UPDATE {self._table} SET id = ? WHERE id = ?", moved)
        self._name(db, Extent(name, len(ids), np.concatenate([np.empty(0, SUM), *sums])))

    def clean(self, db: sqlite3.Connection) -> None:
        """Removes the heaps of compactions, done or killed; who has one mapped keeps it."""
        name = self._extent(db).name
        for path in self._folder.glob(f"{name.rpartition('-')[0]}-*.f32"):
            if path.name != name:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the mapped file once no search uses it."""
        self._rows = None

    def _extent(self, db: sqlite3.Connection) -> Extent:
        statement = "SELECT heap, count, sums FROM vectors WHERE target = ?"
        name, count, sums = db.execute(statement, (self._table,)).fetchone()
        return Extent(name, count, np.frombuffer(sums, SUM))

    def _name(self, db: sqlite3.Connection, extent: Extent) -> None:
        values = extent.name, extent.rows, extent.sums.astype(SUM).tobytes(), self._table
        statement = "UPDATE vectors SET heap = ?, count = ?, sums = ? WHERE target = ?"
        db.execute(statement, values)

    def _write(self, name: str, count: int, parts: Iterable[np.ndarray]) -> None:
        """Appends to the first `count` rows of a heap, and syncs it."""
        path, size = self._folder / name, count * self._dim * VECTOR.itemsize
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            try:
                if file.seek(0, os.SEEK_END) < size:
                    raise UserError(f"{path}: too short; index again, which makes it anew")
                file.truncate(size)
                file.seek(size)
                for part in parts:
                    left = _bytes(part)
                    while left:  # the system writes 2 GB at most at a time, less on a full disk
                        left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(error.errno, error.strerror, os.fspath(path)) from None
                raise UserError(f"{path}: {error.strerror}; nothing was stored") from None
        if not count:
            _sync_names(self._folder)


def _bytes(vectors: np.ndarray) -> memoryview:
    """Of rows that lie one behind the other."""
    return vectors.reshape(-1).view(np.uint8).data


def _sums(vectors: np.ndarray) -> np.ndarray:
    """uint32 CRC-32 of each block of rows."""
    starts = range(0, len(vectors), BLOCK)
    return np.array([zlib.crc32(_bytes(vectors[i : i + BLOCK])) for i in starts], SUM)


def _sync_names(folder: pathlib.Path) -> None:
    """Makes a new file's name last through a power cut."""
    names = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(names)
    finally:
        os.close(names)
