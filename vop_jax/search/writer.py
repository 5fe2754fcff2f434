"""Changes the catalog of an index and its vectors."""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from vop_jax.search import calibration
from vop_jax.search.catalog import (
    FILE,
    FILE_COLUMNS,
    FRAMES_SCHEMA,
    SCHEMA,
    VERSION,
    IndexedFile,
    IndexInfo,
    check,
    checksum_of,
    connect,
    read_info,
    sqlite_errors,
    stored_info,
)
from vop_jax.search.scan import VideoFile
from vop_jax.search.stores.base import TABLES, VectorStore, checked_vectors, named_ids
from vop_jax.search.stores.heap import open_store
from vop_jax.video.moments import Segment

if TYPE_CHECKING:
    from vop_jax.inference.retriever import Retriever

Caption = tuple[str, str, float, float]  # text, path of a video or "", start, end
Frames = tuple[np.ndarray, np.ndarray]  # of M moments: vectors [M, F, E] and seconds [M, F]
LOST = {  # the rows that go with a lost vector of a table
    "moments": "files WHERE id IN (SELECT file FROM moments WHERE id = ?)",
    "captions": "captions WHERE id = ?",
    "frames": "files WHERE id IN (SELECT file FROM moments JOIN frames ON moment = moments.id "
    "WHERE frames.id = ?)",
}


class CatalogWriter:
    """The catalog and vectors of an index, opened by its only writer.

    Changes happen within `with catalog.transaction():`, all of them or none.
    """

    def __init__(self, directory: str | os.PathLike, info: IndexInfo):
        """Opens the index or creates it, and stores this `info`.

        Raises:
            UserError: it is damaged; its store does not answer, or has another's vectors.
        """
        self._path = pathlib.Path(directory) / FILE
        self._stores: dict[str, VectorStore] = {}
        new = stored_info(directory) is None
        with contextlib.ExitStack() as stack, sqlite_errors(self._path):
            # Stores first: if one does not answer, no catalog is bound to it.
            for table in (*TABLES.values(), *["frames"] * info.keep_frames):
                self._stores[table] = open_store(directory, info, table, write=True, new=new)
                stack.callback(self._stores[table].close)
            self._db = connect(self._path, "rwc")
            stack.callback(self._db.close)
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA cache_spill = OFF")  # it would lock readers before a commit
            if new:
                self._create(info)
            else:
                self._check(info)
            stack.pop_all()
        self._dim, self._frames = info.dim, info.frames

    def _create(self, info: IndexInfo) -> None:
        token = secrets.token_hex(8)  # so that no two heaps have the same name
        with self.transaction():
            for statement in (SCHEMA + FRAMES_SCHEMA * info.keep_frames).split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
            for table in self._stores:
                row = (table, f"{token}-{table}-0.{'f16' if table == 'frames' else 'f32'}", 0, b"")
                self._db.execute("INSERT INTO vectors VALUES (?, ?, ?, ?)", row)
            self._write_info(info)

    def _check(self, info: IndexInfo) -> None:
        """Finds damage; forgets files and captions whose vectors are lost."""
        check(self._db, self._path)
        if read_info(self._db) != info:
            with self.transaction():
                self._write_info(info)
        for table, store in self._stores.items():
            lost = store.lost(self._db)
            if not len(lost):
                continue
            logging.warning(
                "%d vectors of %s are lost; their files are indexed again", len(lost), table
            )
            with self.transaction():
                self._db.executemany(f"DELETE FROM {LOST[table]}", ((id,) for id in lost.tolist()))
                store.compact(self._db)
            store.clean(self._db)

    def _write_info(self, info: IndexInfo) -> None:
        values = dataclasses.asdict(info)
        del values["version"]
        row = ("info", json.dumps(values))
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", row)

    def calibrate(self, retriever: "Retriever") -> None:
        """Brings the minimum of scores up to date with the vectors, see `calibration`."""
        (count,) = self._db.execute("SELECT COUNT(*) FROM moments").fetchone()
        stored, new = calibration.read(self._db), None
        if count >= calibration.MOMENTS:
            general = stored.general if stored else retriever.embed_text(calibration.GENERAL)
            moments = self._stores["moments"].snapshot(self._db)
            ids = None if len(moments) == count else named_ids(self._db, "moments")
            new = calibration.calibrate(general, moments, ids, self._described())
        if (new and new.as_json()) != (stored and stored.as_json()):
            with self.transaction():
                self._db.execute("DELETE FROM about WHERE key = ?", (calibration.KEY,))
                if new:
                    row = calibration.KEY, new.as_json()
                    self._db.execute("INSERT INTO about VALUES (?, ?)", row)

    def _described(self) -> np.ndarray:
        """float32 [C, E]: vectors of captions that name indexed videos, evenly picked."""
        statement = (
            "SELECT captions.id FROM captions JOIN files ON files.path = captions.path "
            "WHERE reason IS NULL ORDER BY captions.id"
        )
        ids = np.fromiter((row[0] for row in self._db.execute(statement)), np.int64)
        ids = ids[:: -(-len(ids) // calibration.SAMPLE) or 1]
        if not len(ids):
            return np.empty((0, self._dim), np.float32)
        return self._stores["captions"].snapshot(self._db).get(ids)

    def compact(self) -> None:
        """Frees the room of vectors that the catalog does not name any more."""
        for store in self._stores.values():
            if store.is_sparse(self._db):
                with contextlib.suppress(OSError), self.transaction():  # no room for a copy
                    store.compact(self._db)
            store.clean(self._db)

    def close(self) -> None:
        """Closes it, with its checksum if there is room for that."""
        with contextlib.suppress(sqlite3.Error):
            if not self._db.execute("PRAGMA application_id").fetchone()[0]:
                self._db.execute(f"PRAGMA application_id = {checksum_of(self._db)}")
        self._db.close()
        for store in self._stores.values():
            store.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits all changes within, or none."""
        with sqlite_errors(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("PRAGMA application_id = 0")  # see `check`
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def files(self) -> dict[str, IndexedFile]:
        """All files by their paths."""
        return {file.path: file for file in self._select("1")}

    def twins(self, digest: str) -> list[IndexedFile]:
        """The readable files of this content."""
        return self._select("digest = ? AND reason IS NULL", digest)

    def _select(self, condition: str, *values: Any) -> list[IndexedFile]:
        rows = self._db.execute(f"SELECT {FILE_COLUMNS} FROM files WHERE {condition}", values)
        return [IndexedFile(*row) for row in rows]

    def embedded(self, file: IndexedFile) -> tuple[list[Segment], np.ndarray]:
        """The segments of a file and their vectors, float32 [M, E]."""
        statement = 'SELECT start, "end", id FROM moments WHERE file = ? ORDER BY id'
        rows = self._db.execute(statement, (file.id,)).fetchall()
        ids = np.array([row[2] for row in rows], np.int64)
        return [row[:2] for row in rows], self._stores["moments"].snapshot(self._db).get(ids)

    def embedded_frames(self, file: IndexedFile) -> Frames:
        """The frames of a file's segments, in the order of `embedded`."""
        statement = (
            "SELECT frames.id, seconds FROM frames JOIN moments ON moments.id = moment "
            "WHERE file = ? ORDER BY moment"
        )
        rows = self._db.execute(statement, (file.id,)).fetchall()
        ids = np.array([row[0] for row in rows], np.int64)
        vectors = self._stores["frames"].snapshot(self._db).get(ids)
        seconds = np.stack([np.frombuffer(row[1], "<f4") for row in rows])
        return vectors.reshape(len(rows), self._frames, self._dim), seconds

    def add_files(
        self,
        files: Sequence[tuple[VideoFile, str, Sequence[Segment], np.ndarray]],
        frames: Sequence[Frames] = (),
    ) -> list[int]:
        """Adds files in place of those with the same paths; returns the ids of their moments.

        Args:
            files: (file, digest of its content, its M segments, their vectors [M, E]).
            frames: of each file, in an index that keeps frames.

        Raises:
            UserError: a vector with NaN or of another width.
        """
        vectors = np.concatenate([vectors for _, _, _, vectors in files])
        ids = self._append("moments", vectors)
        unused = iter(ids)
        for file, digest, segments, _ in files:
            row = self._insert(file, digest, None)
            moments = [(next(unused), row, *segment) for segment in segments]
            self._db.executemany("INSERT INTO moments VALUES (?, ?, ?, ?)", moments)
        if frames:
            self._add_frames(ids, *map(np.concatenate, zip(*frames, strict=True)))
        return ids

    def _add_frames(self, moments: list[int], vectors: np.ndarray, seconds: np.ndarray) -> None:
        """Adds the frames of moments: vectors [M, F, E], seconds [M, F]."""
        rows = checked_vectors(vectors.reshape(len(moments), -1), self._frames * self._dim)
        ids = self._stores["frames"].append(self._db, rows)
        times = (row.tobytes() for row in seconds.astype("<f4"))
        values = zip(ids, moments, times, strict=True)
        self._db.executemany("INSERT INTO frames VALUES (?, ?, ?)", values)

    def add_unreadable(self, file: VideoFile, reason: str) -> None:
        """Adds a file that is not read again before it changes."""
        self._insert(file, None, reason)

    def _insert(self, file: VideoFile, digest: str | None, reason: str | None) -> int | None:
        self.remove([file.path])
        values = file.path, file.size, file.mtime, digest, reason
        columns = "(path, size, mtime, digest, reason)"
        statement = f"INSERT INTO files {columns} VALUES (?, ?, ?, ?, ?)"
        return self._db.execute(statement, values).lastrowid

    def _append(self, table: str, vectors: np.ndarray) -> list[int]:
        return self._stores[table].append(self._db, checked_vectors(vectors, self._dim))

    def move(self, indexed: IndexedFile, file: VideoFile) -> None:
        """Gives indexed content another path or date."""
        if file.path != indexed.path:
            self.remove([file.path])
        values = file.path, file.size, file.mtime, indexed.id
        self._db.execute("UPDATE files SET path = ?, size = ?, mtime = ? WHERE id = ?", values)

    def remove(self, paths: Iterable[str]) -> None:
        """Removes files and their moments."""
        self._db.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in paths))

    def captions(self) -> dict[Caption, int]:
        """All captions, with their ids."""
        rows = self._db.execute('SELECT text, path, start, "end", id FROM captions')
        return {row[:4]: row[4] for row in rows}

    def add_captions(self, captions: Sequence[Caption], vectors: np.ndarray) -> None:
        """Adds captions and their vectors [M, E]."""
        ids = self._append("captions", vectors)
        rows = ((number, *caption) for number, caption in zip(ids, captions, strict=True))
        self._db.executemany("INSERT INTO captions VALUES (?, ?, ?, ?, ?)", rows)

    def remove_captions(self, ids: Iterable[int]) -> None:
        """Removes captions."""
        self._db.executemany("DELETE FROM captions WHERE id = ?", ((number,) for number in ids))
