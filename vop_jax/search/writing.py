"""The catalog of an index while it is being changed."""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from vop_jax.search import catalog
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.stores.base import TABLES, VectorStore
from vop_jax.search.stores.open import open_store
from vop_jax.video.moments import Span


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
    """A catalog that is being changed, with its vectors, by one process at a time.

    Changes happen in `with catalog.transaction():`, all of them or none.
    """

    def __init__(self, path: pathlib.Path, stores: dict[str, VectorStore]):
        self.path, self._stores = path, stores
        self._db = catalog.connect(path, "rwc")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA cache_spill = OFF")  # it would lock readers out before a commit

    @classmethod
    def open(cls, directory: str | os.PathLike, info: IndexInfo) -> "Catalog":
        """The one that is there, or a new one; its `info` becomes this.

        Raises:
            UserError: it is damaged; a database of vectors does not answer, or has another's.
        """
        path = pathlib.Path(directory) / catalog.FILE
        new = catalog.stored_info(directory) is None
        # Before there is a catalog, which would bind it to a store that is not there.
        with contextlib.ExitStack() as stack, catalog.sqlite_errors(path):
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
            for statement in catalog.SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {catalog.VERSION}")
            for table in self._stores:
                row = (table, f"{token}-{table}-0.f32", 0, b"")
                self._db.execute("INSERT INTO vectors VALUES (?, ?, ?, ?)", row)
            self._write_info(info)

    def _check(self, info: IndexInfo) -> None:
        """Finds damage; of files and captions whose vectors are lost nothing stays known."""
        catalog.check(self._db, self.path)
        if catalog.read_info(self._db) != info:
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
                self._db.execute(f"PRAGMA application_id = {catalog.seal_of(self._db)}")
        self._db.close()
        for store in self._stores.values():
            store.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside or none."""
        with catalog.sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("PRAGMA application_id = 0")  # see catalog.seal_of
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

    def store_vectors(self, table: str, vectors: np.ndarray) -> list[int]:
        """Puts vectors [N, E] where the transaction's commit makes them count; their ids."""
        return self._stores[table].append(self._db, vectors).tolist()

    def vectors(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [N, E] of moments."""
        return self._stores["moments"].snapshot(self._db).get(np.array(ids, np.int64))

    def add(
        self, path: str, size: int, mtime: int, digest: str, spans: Sequence[Span], ids: list[int]
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

    def moments(self, file: File) -> list[tuple[int, Span]]:
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
