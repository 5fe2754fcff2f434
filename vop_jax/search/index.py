"""An index that is open to search: vectors in, moments of files out."""

import os
import pathlib
import threading

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search import calibration, catalog, query, sources
from vop_jax.search.calibration import Calibration
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.listing import Listing
from vop_jax.search.query import Date, Hit, make_filter
from vop_jax.search.rerank import CANDIDATES, rerank
from vop_jax.search.stores.base import TABLES, Snapshot, VectorStore, checked_vectors
from vop_jax.search.stores.heap import open_store

__all__ = ["Hit", "Index"]


class Index(Listing):
    """An index that is open to search; threads may share it.

    Each search sees one state of the index, the last one that a writer committed.

    Attributes:
        directory: of the index.
        name: the same, for messages.
        info: what it was made with.
    """

    def __init__(self, directory: str | os.PathLike):
        """Opens it to read.

        Raises:
            UserError: there is no index, it is damaged, or of another version.
        """
        self.directory, self.name = pathlib.Path(directory), os.fspath(directory)
        with catalog.reading(directory) as db:
            catalog.check(db, self.directory / catalog.FILE)
            self.info: IndexInfo = catalog.read_info(db)
        self._lock = threading.Lock()
        self._stores: dict[str, VectorStore] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "Index":
        """The same as `Index(directory)`, for scripts that were written for version 0.1."""
        return cls(directory)

    def open_vectors(self) -> None:
        """Opens the vectors now instead of at the first search, which reports errors now.

        Raises:
            UserError: they are damaged or missing, or a database does not answer.
        """
        self.store("videos")

    def close(self) -> None:
        """Releases the vectors."""
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
        min_score: float | str | None = None,
        by_frames: bool = False,
    ) -> list[list[Hit]]:
        """The nearest moments, or captions, of each vector, best first.

        Args:
            vectors: float32 [N, E], unit rows.
            k: the number of hits of each; fewer where the index has fewer.
            to: "videos" or "captions".
            folder, since, until: see `query.make_filter`.
            per_file: only the best hit of each file, or caption text.
            min_score: leaves out hits with a lower score. "auto", for vectors of texts: leaves out
                moments whose score may be chance, see `calibration`; it does nothing to captions,
                nor in an index that is too small to calibrate.
            by_frames: ranks the nearest `CANDIDATES` again by their frames, see `rerank`.

        Raises:
            UserError: an argument is wrong.
        """
        if to not in TABLES:
            raise UserError(f"to={to!r}: allowed are {', '.join(TABLES)}")
        if not 1 <= k <= query.MOST:
            raise UserError(f"k={k}: must be 1 to {query.MOST}")
        vectors = checked_vectors(vectors, self.info.dim)
        minimum = query.checked_min_score(min_score)
        path = "captions.path" if to == "captions" else "files.path"
        where = make_filter(folder, since, until).sql(path)
        if by_frames:
            self._check_frames(to)
        store = self.store(to)
        with catalog.reading(self.directory) as db:
            if catalog.read_info(db).model != self.info.model:  # `store` has the old vectors
                raise UserError(f"{self.directory}: was rebuilt with another model; open it again")
            snapshot, count = store.snapshot(db), max(k, CANDIDATES) if by_frames else k
            found = query.search(db, snapshot, vectors, count, to, where, per_file)
            known = calibration.read(db) if minimum == "auto" and to == "videos" else None
            if known is not None:
                pairs = zip(vectors, found, strict=True)
                kept = [_above_chance(known, snapshot, *pair) for pair in pairs]
            else:
                lowest = minimum if isinstance(minimum, float) else -np.inf
                kept = [[hit for _, hit in hits if hit.score >= lowest] for hits in found]
            if not by_frames:
                return kept
            frames = self._frames().snapshot(db)
            return [rerank(db, frames, *pair, k) for pair in zip(vectors, kept, strict=True)]

    def _check_frames(self, to: str) -> None:
        """Raises UserError where there are no vectors of frames."""
        if to == "captions":
            raise UserError("by_frames: captions have no frames")
        if not self.info.keep_frames:
            raise UserError(f"{self.directory}: was made without --keep_frames")

    def calibration(self) -> Calibration | None:
        """What `min_score="auto"` goes by; None in an index that is too small, or an older one."""
        with catalog.reading(self.directory) as db:
            return calibration.read(db)

    def store(self, target: str) -> VectorStore:
        """The vectors of a target; the first use compares them with their checksums."""
        with self._lock:
            if target not in self._stores:
                store = open_store(self.directory, self.info, TABLES[target], write=False)
                with catalog.reading(self.directory) as db:
                    snapshot = store.snapshot(db)
                snapshot.check()  # outside of `reading`, which makes a writer wait
                self._stores[target] = store
            return self._stores[target]

    def _frames(self) -> VectorStore:
        """The vectors of frames; a search compares those that it reads with their checksums."""
        with self._lock:
            if "frames" not in self._stores:
                store = open_store(self.directory, self.info, "frames", write=False)
                self._stores["frames"] = store
            return self._stores["frames"]

    def is_current(self) -> bool:
        """Whether it still has the vectors of the model that it was opened with.

        Raises:
            UserError: it cannot be read.
        """
        with catalog.reading(self.directory) as db:
            return catalog.read_info(db).model == self.info.model

    def changed(self) -> float:
        """Unix time of the last change; raises OSError where it is gone."""
        return (self.directory / catalog.FILE).stat().st_mtime

    @property
    def folder(self) -> str:
        """The folder of the videos; it may have moved since this index was opened."""
        with catalog.reading(self.directory) as db:
            return catalog.read_info(db).folder

    def path_of(self, file_id: int) -> pathlib.Path | str:
        """Where a file was when it was indexed; an address is text.

        Raises:
            UserError: no indexed file has this id.
        """
        return sources.as_path(sources.locate(self.folder, self.file_of(file_id).path))

    def file_of(self, file_id: int) -> IndexedFile:
        """The row of a file in the catalog.

        Raises:
            UserError: no indexed file has this id.
        """
        with catalog.reading(self.directory) as db:
            statement = f"SELECT {catalog.FILE_COLUMNS} FROM files WHERE id = ?"
            row = db.execute(statement, (file_id,)).fetchone()
        if row is None:
            raise UserError(f"file {file_id}: not in the index {self.directory}")
        return IndexedFile(*row)

    def counts(self) -> dict[str, int]:
        """Numbers of `files`, `moments` (with whole clips), `captions`, and `failed` files."""
        sources = {
            "files": "files WHERE reason IS NULL",
            "moments": "moments",
            "captions": "captions",
            "failed": "files WHERE reason IS NOT NULL",
        }
        with catalog.reading(self.directory) as db:
            return {
                name: db.execute(f"SELECT COUNT(*) FROM {source}").fetchone()[0]
                for name, source in sources.items()
            }

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of files that could not be read."""
        statement = "SELECT path, reason FROM files WHERE reason IS NOT NULL ORDER BY path"
        with catalog.reading(self.directory) as db:
            return list(db.execute(statement))


def _above_chance(
    known: Calibration, snapshot: Snapshot, vector: np.ndarray, hits: list[tuple[int, Hit]]
) -> list[Hit]:
    """Those of (id, moment) that have enough evidence for the text of a vector [E]."""
    if not hits:
        return []
    moments = snapshot.get(np.array([number for number, _ in hits], np.int64))
    scores = np.array([hit.score for _, hit in hits])
    enough = known.evidence(scores, moments) >= known.limit
    return [hit for (_, hit), passes in zip(hits, enough, strict=True) if passes]
