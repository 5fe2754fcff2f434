"""An index to search: vectors in, moments of files out."""

import contextlib
import dataclasses
import json
import os
import pathlib
import sqlite3
import threading
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search import catalog
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.exact import ExactStore
from vop_jax.search.filters import Filter, Moment, make_filter
from vop_jax.search.store import VectorStore, open_store

TARGETS = ("videos", "captions")
# So many vectors are told to a store one by one; of a larger share the best of all are filtered.
FEW = 20_000
# Nearest vectors that are looked at first: many may be moments of one file.
FIRST, EACH = 64, 16
WIDER = 8  # times as many, where these were not enough
MOST = 16_384  # that Milvus finds at once

# The columns of a hit but for its score.
FOUND = {
    "videos": "moments.id, files.id, files.path, moments.start, moments.\"end\", '' "
    "FROM moments JOIN files ON files.id = moments.file WHERE",
    "captions": "captions.id, COALESCE(files.id, 0), captions.path, captions.start, "
    'captions."end", captions.text '
    "FROM captions LEFT JOIN files ON files.path = captions.path WHERE",
}
ID = {"videos": "moments.id", "captions": "captions.id"}


@dataclasses.dataclass(frozen=True)
class Hit:
    """What a search found.

    Attributes:
        file_id: of the video, for `Index.path_of`; 0 for a caption of no indexed video.
        path: of the video, relative to the indexed folder; "" for a caption that names none.
        score: cosine of the angle between the vectors.
        start, end: seconds of the moment, or of the whole clip.
        caption: the text of a caption, else "".
    """

    file_id: int
    path: str
    score: float
    start: float
    end: float
    caption: str = ""


def vectors_uri(directory: str | os.PathLike, store: str, target: str) -> str:
    """Where the vectors of an index lie; captions are few enough for the index's own folder."""
    if target == "videos" and store:
        return store
    return os.path.join(os.path.abspath(directory), {"videos": "vectors"}.get(target, target))


class Index:
    """An index that is open to be searched; threads may share it.

    Each search sees one state of it, the last one that a writer finished.

    Attributes:
        info: what it was made with.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        with catalog.reading(directory) as db:
            self.info: IndexInfo = catalog.read_info(db)
        self._lock = threading.Lock()
        self._stores: dict[str, tuple[int, VectorStore]] = {}

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
            UserError: they are gone, or a database does not answer.
        """
        with catalog.reading(self.directory) as db:
            self._store(db, "videos")

    def close(self) -> None:
        """Lets go of the vectors."""
        with self._lock:
            for _, store in self._stores.values():
                store.close()
            self._stores.clear()

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        to: str = "videos",
        folder: str | None = None,
        since: Moment = None,
        until: Moment = None,
        per_file: bool = True,
    ) -> list[list[Hit]]:
        """The nearest moments, or captions, of each of several vectors.

        Args:
            vectors: float32 [N, E], unit rows.
            k: how many; fewer are found where there are no more.
            to: "videos" or "captions".
            folder, since, until: see `filters.make_filter`.
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
        with catalog.reading(self.directory) as db:
            return _Search(db, self._store(db, to), to, where, per_file).run(vectors, k)

    def _store(self, db: sqlite3.Connection, target: str) -> VectorStore:
        """The vectors of this state of the catalog, or of a later one."""
        now = catalog.generation(db)
        with self._lock:
            made, store = self._stores.get(target, (-1, None))
            if store is None or (made < now and isinstance(store, ExactStore)):
                # An exact store shows what there was when it was opened. The old one is not
                # closed: other threads may be at it. It goes when they are done.
                uri = vectors_uri(self.directory, self.info.store, target)
                store = open_store(uri, self.info.dim, write=False)
                self._stores[target] = now, store
            return store

    def path_of(self, file_id: int) -> pathlib.Path:
        """Where a file lies, or lay when it was indexed.

        Raises:
            UserError: no indexed file has this id.
        """
        with catalog.reading(self.directory) as db:
            row = db.execute("SELECT path FROM files WHERE id = ?", (file_id,)).fetchone()
            folder = catalog.read_info(db).folder
        if row is None:
            raise UserError(f"file {file_id}: not in the index {self.directory}")
        return pathlib.Path(folder, row[0])

    def file_of(self, file_id: int) -> catalog.File:
        """What is known of a file.

        Raises:
            UserError: no indexed file has this id.
        """
        with catalog.reading(self.directory) as db:
            statement = "SELECT id, path, size, mtime, digest, reason FROM files WHERE id = ?"
            row = db.execute(statement, (file_id,)).fetchone()
        if row is None:
            raise UserError(f"file {file_id}: not in the index {self.directory}")
        return catalog.File(*row)

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


class _Search:
    """One search of one state of an index."""

    def __init__(
        self, db: sqlite3.Connection, store: VectorStore, to: str, where: Filter, per_file: bool
    ):
        self._db, self._store, self._to, self._where = db, store, to, where
        self._per_file = per_file

    def run(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """Looks at more and more of the nearest, until k of them are what is asked for."""
        allowed = self._matching(FEW) if self._where else None
        total = len(self._store) if allowed is None else len(allowed)
        count = FIRST + (EACH if self._per_file else 1) * k
        while True:
            count = min(count, total, MOST)
            if not count:
                return [[] for _ in vectors]
            ids, scores = self._store.search(vectors, count, allowed)
            found = [self._hits(*row, k) for row in zip(ids, scores, strict=True)]
            short = [i for i, hits in enumerate(found) if len(hits) < k]
            if not short or count == total:
                return found
            if count == MOST:
                for i in short:
                    found[i] = self._by_exclusion(vectors[i], k)
                return found
            count *= WIDER

    def _by_exclusion(self, vector: np.ndarray, k: int) -> list[Hit]:
        """Where thousands of the nearest are moments of few files: again, without those files."""
        ids = self._matching(None)
        assert ids is not None
        hits: list[Hit] = []
        while len(hits) < k and len(ids):
            found, scores = self._store.search(vector[None], min(MOST, len(ids)), ids)
            hits += self._hits(found[0], scores[0], k - len(hits))
            if not self._per_file:
                break
            ids = np.setdiff1d(ids, self._of_same(hits), assume_unique=True)
        return hits

    def _of_same(self, hits: list[Hit]) -> np.ndarray:
        """int64 ids of all moments of the files of hits, or captions of their texts."""
        if self._to == "videos":
            return self._ids(
                "SELECT id FROM moments WHERE file IN (SELECT value FROM json_each(?))",
                json.dumps([hit.file_id for hit in hits]),
            )
        return self._ids(
            "SELECT id FROM captions WHERE text IN (SELECT value FROM json_each(?))",
            json.dumps([hit.caption for hit in hits]),
        )

    def _ids(self, statement: str, *values: Any) -> np.ndarray:
        return np.fromiter((row[0] for row in self._db.execute(statement, values)), np.int64)

    def _matching(self, most: int | None) -> np.ndarray | None:
        """int64 ids of what the filter lets pass; None for more than `most`."""
        source = FOUND[self._to][FOUND[self._to].index("FROM") :]
        statement = f"SELECT {ID[self._to]} {source} 1 {self._where.sql}"
        values: tuple[Any, ...] = self._where.values
        if most is not None:
            statement, values = statement + " LIMIT ?", (*values, most + 1)
        ids = self._ids(statement, *values)
        return None if most is not None and len(ids) > most else ids

    def _hits(self, ids: np.ndarray, scores: np.ndarray, k: int) -> list[Hit]:
        """The first k of them that the catalog knows and the filter lets pass."""
        rows = self._db.execute(
            f"SELECT {FOUND[self._to]} {ID[self._to]} IN (SELECT value FROM json_each(?)) "
            + self._where.sql,
            (json.dumps(ids.tolist()), *self._where.values),
        )
        known = {row[0]: row[1:] for row in rows}
        hits: list[Hit] = []
        seen = set()
        for number, score in zip(ids.tolist(), scores.tolist(), strict=True):
            with contextlib.suppress(KeyError):
                file, path, start, end, caption = known[number]
                if self._per_file and (caption or file) in seen:
                    continue
                seen.add(caption or file)
                hits.append(Hit(file, path, score, start, end, caption))
                if len(hits) == k:
                    break
        return hits
