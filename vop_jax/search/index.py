"""An index to search: vectors in, moments of files out."""

import os
import pathlib
import threading

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search import catalog
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.query import TARGETS, Date, Hit, Search, make_filter
from vop_jax.search.stores.base import MOST, TABLES, VectorStore
from vop_jax.search.stores.open import open_store


class Index:
    """An index that is open to be searched; threads may share it.

    Each search sees one state of it, the last one that a writer finished.

    Attributes:
        info: what it was made with.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        with catalog.reading(directory) as db:
            catalog.check(db, self.directory / catalog.FILE)
            self.info: IndexInfo = catalog.read_info(db)
        self._lock = threading.Lock()
        self._stores: dict[str, VectorStore] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "Index":
        """Opens it to read.

        Raises:
            UserError: there is no index, or one of a newer version.
        """
        return cls(directory)

    def open_vectors(self) -> None:
        """Opens them now, not at the first search, for what is wrong with them to be told now.

        Raises:
            UserError: they are damaged or gone, or a database does not answer.
        """
        self._store("videos")

    def close(self) -> None:
        """Lets go of the vectors."""
        with self._lock:
            for store in self._stores.values():
                store.close()
            self._stores.clear()

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        to: str = "videos",
        folder: str | None = None,
        since: Date = None,
        until: Date = None,
        per_file: bool = True,
    ) -> list[list[Hit]]:
        """The nearest moments, or captions, of each of several vectors.

        Args:
            vectors: float32 [N, E], unit rows.
            k: how many; fewer are found where there are no more.
            to: "videos" or "captions".
            folder, since, until: see `query.make_filter`.
            per_file: of each file, or text, the best alone.

        Raises:
            UserError: an argument is not what it should be.
        """
        if to not in TARGETS:
            raise UserError(f"to={to!r}: allowed are {', '.join(TARGETS)}")
        if not 1 <= k <= MOST:
            raise UserError(f"k={k}: must be 1 to {MOST}")
        where = make_filter(
            folder, since, until, "captions.path" if to == "captions" else "files.path"
        )
        store = self._store(to)
        with catalog.reading(self.directory) as db:
            # Where it is another, its vectors are, too.
            if catalog.read_info(db).model != self.info.model:
                anew = "was made anew, by another model; open it again"
                raise UserError(f"{self.directory}: {anew}")
            return Search(db, store.snapshot(db), to, where, per_file).run(vectors, k)

    def _store(self, target: str) -> VectorStore:
        """The vectors; those of a folder are compared with their checksums when it is opened."""
        with self._lock:
            if target not in self._stores:
                store = open_store(self.directory, self.info, TABLES[target], write=False)
                with catalog.reading(self.directory) as db:
                    snapshot = store.snapshot(db)
                # Not while the catalog is read, which would hold a writer up for long.
                snapshot.check()
                self._stores[target] = store
            return self._stores[target]

    @property
    def folder(self) -> str:
        """Where the videos lie; it may have moved since this was opened."""
        with catalog.reading(self.directory) as db:
            return catalog.read_info(db).folder

    def path_of(self, file_id: int) -> pathlib.Path:
        """Where a file lies, or lay when it was indexed.

        Raises:
            UserError: no indexed file has this id.
        """
        return pathlib.Path(self.folder, self.file_of(file_id).path)

    def file_of(self, file_id: int) -> IndexedFile:
        """What is known of a file.

        Raises:
            UserError: no indexed file has this id.
        """
        with catalog.reading(self.directory) as db:
            statement = "SELECT id, path, size, mtime, digest, reason FROM files WHERE id = ?"
            row = db.execute(statement, (file_id,)).fetchone()
        if row is None:
            raise UserError(f"file {file_id}: not in the index {self.directory}")
        return IndexedFile(*row)

    def counts(self) -> dict[str, int]:
        """How many `files`, `moments` (whole clips among them), `captions`, and files `failed`."""
        asked = {
            "files": "files WHERE reason IS NULL",
            "moments": "moments",
            "captions": "captions",
            "failed": "files WHERE reason IS NOT NULL",
        }
        with catalog.reading(self.directory) as db:
            return {
                name: db.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0]
                for name, what in asked.items()
            }

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of files that could not be read."""
        with catalog.reading(self.directory) as db:
            return list(
                db.execute("SELECT path, reason FROM files WHERE reason IS NOT NULL ORDER BY path")
            )
