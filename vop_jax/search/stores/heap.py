"""The default store: vectors in a memory-mapped file, searched exactly.

A heap is a file of little-endian rows [M, E]; the id of a vector is its row. Rows are
appended and synced before the catalog's transaction commits their count; rows behind that count do
not exist. The catalog also has a CRC-32 of each block of rows. When most rows are dead, the others
are copied to a new heap, and one commit of the catalog replaces the old one by it.
"""

import contextlib
import errno
import os
import pathlib
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.stores.base import NO_ID, VectorStore, distinct, named_ids

if TYPE_CHECKING:
    import jax

VECTOR, FRAMES, SUM = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<u4")
BLOCK = 1024  # rows under one checksum
SLACK = 1024  # dead rows that are not worth a compaction
COPIED = 16 * BLOCK  # rows that a compaction copies at a time


class Extent(NamedTuple):
    """The rows of a heap that count in one state of the catalog.

    Attributes:
        name: of the file; no two heaps ever have the same.
        rows: M.
        sums: uint32, CRC-32 of each block of `BLOCK` rows; the last block may be shorter.
    """

    name: str
    rows: int
    sums: np.ndarray


class HeapSnapshot:
    """The `Snapshot` of a heap; its file may be unlinked meanwhile."""

    def __init__(
        self,
        path: pathlib.Path,
        dim: int,
        dtype: np.dtype,
        extent: Extent,
        earlier: "HeapSnapshot | None" = None,
    ):
        """Maps the rows that the file has.

        Args:
            earlier: of the same store; blocks that it has read are not read again.
        """
        self.extent, self._path = extent, path
        size = path.stat().st_size if path.exists() else 0
        rows = min(extent.rows, size // (dtype.itemsize * dim))
        self.vectors = np.empty((0, dim), dtype)
        if rows:
            self.vectors = np.memmap(path, dtype, "r", shape=(rows, dim))
        self._computed = np.full(len(extent.sums), -1, np.int64)  # checksums; -1: not read yet
        if earlier is not None and earlier._path == path:
            shared = min(len(self._computed), len(earlier._computed))
            self._computed[:shared] = earlier._computed[:shared]

    def __len__(self) -> int:
        return len(self.vectors)

    def check(self, blocks: np.ndarray | None = None) -> None:
        if len(bad := self.bad_blocks(blocks)):
            raise UserError(
                f"{self._path}: damaged or missing, first near row {bad[0] * BLOCK}; index again "
                "(python -m vop_jax.search index --index=DIR) to rebuild the lost vectors"
            )

    def bad_blocks(self, blocks: np.ndarray | None = None) -> np.ndarray:
        """int64 numbers of the blocks without their checksums; a good block is read once.

        Args:
            blocks: to look at; by default all.
        """
        blocks = np.arange(len(self.extent.sums)) if blocks is None else blocks
        todo = blocks[self._computed[blocks] != self.extent.sums[blocks]]
        if len(todo):
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                self._computed[todo] = list(pool.map(self._sum, todo.tolist()))
        return todo[self._computed[todo] != self.extent.sums[todo]]

    def _sum(self, block: int) -> int:
        return zlib.crc32(_bytes(self.vectors[block * BLOCK : (block + 1) * BLOCK]))

    def get(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if len(ids) and np.max(ids) >= self.extent.rows:
            raise UserError(f"store {self._path.parent}: has no id {np.max(ids)}")
        self.check(np.unique(ids // BLOCK))
        return np.array(self.vectors[ids], np.float32)

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        from vop_jax.search.stores import top_k  # jax, which a writer's tools do without

        rows = None if allowed is None else distinct(allowed)
        if rows is not None:
            rows = rows[rows < len(self)]
        ids = np.full((len(queries), k), NO_ID, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        count = min(k, len(self) if rows is None else len(rows))
        if count and len(queries):
            self.check()
            if self._placed is not None:
                best = top_k.on_device(self._placed, rows, queries, count)
            else:
                best = top_k.on_host(self.vectors, rows, queries, count)
            ids[:, :count], scores[:, :count] = best
        return ids, scores

    @cached_property
    def _placed(self) -> "jax.Array | None":
        """The vectors on a GPU or TPU, from the first search on; else None."""
        from vop_jax.search.stores import top_k

        return top_k.place(self.vectors)


class Heap:
    """A `VectorStore` in a folder. Any number of threads may search it."""

    def __init__(
        self,
        folder: str | os.PathLike,
        dim: int,
        table: str,
        *,
        write: bool,
        dtype: np.dtype = VECTOR,
    ):
        self._folder, self._dim, self._table = pathlib.Path(folder), dim, table
        self._dtype = dtype
        self._lock = threading.Lock()
        self._snapshot: HeapSnapshot | None = None
        if write:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"store {folder}: {error.strerror}") from None

    def snapshot(self, db: sqlite3.Connection) -> HeapSnapshot:
        extent = self._extent(db)
        with self._lock:
            last = self._snapshot
            if last is None or last.extent[:2] != extent[:2]:
                path = self._folder / extent.name
                self._snapshot = last = HeapSnapshot(path, self._dim, self._dtype, extent, last)
            return last

    def append(self, db: sqlite3.Connection, vectors: np.ndarray) -> list[int]:
        vectors = np.ascontiguousarray(vectors, self._dtype)
        name, count, sums = self._extent(db)
        room = -count % BLOCK  # in the last block
        if room:
            sums = np.append(sums[:-1], zlib.crc32(_bytes(vectors[:room]), int(sums[-1])))
        self._write(name, count, [vectors])
        total = count + len(vectors)
        self._store_extent(db, Extent(name, total, np.append(sums, _sums(vectors[room:]))))
        return list(range(count, total))

    def lost(self, db: sqlite3.Connection) -> np.ndarray:
        ids = named_ids(db, self._table)
        return ids[np.isin(ids // BLOCK, self.snapshot(db).bad_blocks())]

    def is_sparse(self, db: sqlite3.Connection) -> bool:
        (alive,) = db.execute(f"SELECT COUNT(*) FROM {self._table}").fetchone()
        return self._extent(db).rows > 2 * alive + SLACK

    def compact(self, db: sqlite3.Connection) -> None:
        vectors, ids = self.snapshot(db).vectors, named_ids(db, self._table)
        name, suffix = os.path.splitext(self._extent(db).name)
        stem, _, number = name.rpartition("-")
        name = f"{stem}-{int(number) + 1}{suffix}"
        sums = [np.empty(0, SUM)]

        def parts() -> Iterator[np.ndarray]:
            for start in range(0, len(ids), COPIED):
                part = np.ascontiguousarray(vectors[ids[start : start + COPIED]])
                sums.append(_sums(part))
                yield part

        self._write(name, 0, parts())
        # In ascending order: a row's new id is its own or that of a row which has moved already.
        moved = ((new, old) for new, old in enumerate(ids.tolist()) if new != old)
        db.executemany(f"UPDATE {self._table} SET id = ? WHERE id = ?", moved)
        self._store_extent(db, Extent(name, len(ids), np.concatenate(sums)))

    def clean(self, db: sqlite3.Connection) -> None:
        name = self._extent(db).name
        for path in self._folder.glob(f"{name.rpartition('-')[0]}-*.f*"):
            if path.name != name:
                path.unlink(missing_ok=True)  # a reader that has mapped it keeps it

    def close(self) -> None:
        self._snapshot = None

    def _extent(self, db: sqlite3.Connection) -> Extent:
        statement = "SELECT heap, count, sums FROM vectors WHERE target = ?"
        name, count, sums = db.execute(statement, (self._table,)).fetchone()
        return Extent(name, count, np.frombuffer(sums, SUM))

    def _store_extent(self, db: sqlite3.Connection, extent: Extent) -> None:
        values = extent.name, extent.rows, extent.sums.astype(SUM).tobytes(), self._table
        db.execute("UPDATE vectors SET heap = ?, count = ?, sums = ? WHERE target = ?", values)

    def _write(self, name: str, count: int, parts: Iterable[np.ndarray]) -> None:
        """Writes rows behind the first `count` rows of a heap, and syncs the file."""
        path, size = self._folder / name, count * self._dim * self._dtype.itemsize
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            try:
                if file.seek(0, os.SEEK_END) < size:
                    raise UserError(f"{path}: too short; index again to rebuild it")
                file.truncate(size)
                file.seek(size)
                for part in parts:
                    left = _bytes(part)
                    while left:  # the system writes at most 2 GB at a time, less on a full disk
                        left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(error.errno, error.strerror, os.fspath(path)) from None
                raise UserError(f"{path}: {error.strerror}; nothing was stored") from None
        if not count:  # a new file: its name must survive a power cut, too
            folder = os.open(self._folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def open_store(
    directory: str | os.PathLike, info: IndexInfo, table: str, *, write: bool, new: bool = False
) -> VectorStore:
    """Opens the vectors of an index.

    Args:
        directory: of the index; it holds the vectors unless `info.store` is another place: a folder
            (exact search over a memory-mapped file); a file ending in ".db" or "milvus-lite:FILE"
            (Milvus Lite); "http://HOST:PORT" or "https://…" (a Milvus server). #COLLECTION at the
            end names a Milvus collection other than "vop_jax". Captions and frames stay in
            `directory`.
        table: of the catalog, whose vectors they are.
        write: opens it to change it, as the only writer; a missing store is created.
        new: refuses a database that holds vectors.

    Raises:
        UserError: the store is missing, has another width or belongs to another index; a package
            is missing; a database does not answer.
    """
    if table == "frames":
        return Heap(directory, info.frames * info.dim, table, write=write, dtype=FRAMES)
    uri = info.store if table == "moments" else ""
    if uri.startswith(("milvus-lite:", "http://", "https://")) or uri.split("#")[0].endswith(".db"):
        from vop_jax.search.stores.milvus import MilvusStore

        return MilvusStore(uri, info.dim, table, write=write, new=new)
    if "://" in uri:
        raise UserError(f"store {uri}: must be a local folder, FILE.db or http(s)://HOST:PORT")
    return Heap(uri or directory, info.dim, table, write=write)


def _bytes(vectors: np.ndarray) -> memoryview:
    """The bytes of contiguous rows [M, E], not copied."""
    return vectors.reshape(-1).view(np.uint8).data


def _sums(vectors: np.ndarray) -> np.ndarray:
    """CRC-32 of each block of rows [M, E]: uint32 [blocks]."""
    starts = range(0, len(vectors), BLOCK)
    return np.array([zlib.crc32(_bytes(vectors[i : i + BLOCK])) for i in starts], SUM)
