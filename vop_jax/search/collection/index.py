"""An index on a server that is open to search, with the methods of `search.index.Index`."""

import itertools
import pathlib
from collections.abc import Iterable

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search import calibration, query, sources
from vop_jax.search.calibration import Calibration
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.collection import vector_index
from vop_jax.search.collection.schema import (
    FILES,
    MOMENTS,
    Collections,
    Row,
    expression,
    indexed_file,
    quote,
)
from vop_jax.search.listing import ListedFile, Neighbours, neighbours_among
from vop_jax.search.query import Date, Hit, make_filter
from vop_jax.search.stores.base import checked_vectors
from vop_jax.search.stores.client import MOST

HIT_FIELDS = ("path", "file", "start", "end")
READABLE = 'reason == ""'


class CollectionIndex:
    """An index on a server; threads may share it. It keeps nothing on this machine.

    A search sees the moments that the server has, while a run changes them, too.

    Attributes:
        name: its address, for messages.
        info: what it was made with.
        vector_index: the kind of its vector index.
    """

    def __init__(self, uri: str, *, fresh: bool = True):
        """Opens it.

        Args:
            fresh: see `Collections`.

        Raises:
            UserError: the server does not answer, or has no such index.
        """
        self.name, self._collections = uri, Collections(uri, fresh=fresh)
        if not self._collections.exist():
            raise UserError(
                f"store {uri}: no index there; make one with vop search index --store={uri}"
            )
        self.info: IndexInfo = self._collections.info()
        self.vector_index = vector_index.parse(self.info.vector_index)

    def open_vectors(self) -> None:
        """Does nothing: the server has them open."""

    def close(self) -> None:
        """Ends the connection."""
        self._collections.close()

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
        """The nearest moments of each vector; arguments and errors are those of `Index.search`."""
        if to != "videos" or by_frames:
            what = "vectors of frames" if by_frames else "captions"
            raise UserError(f"{self.name}: an index on a server holds no {what}")
        if not 1 <= k <= query.MOST:
            raise UserError(f"k={k}: must be 1 to {query.MOST}")
        vectors = checked_vectors(vectors, self.info.dim)
        minimum = query.checked_min_score(min_score)
        where = expression(make_filter(folder, since, until))
        found = self._nearest(vectors, k, where, per_file)
        known = self.calibration() if minimum == "auto" else None
        if known is not None:
            rows = [self._above_chance(known, hits) for hits in found]
        else:
            lowest = minimum if isinstance(minimum, float) else -np.inf
            rows = [[row for row in hits if row["score"] >= lowest] for hits in found]
        return [[_hit(row) for row in hits] for hits in rows]

    def _nearest(self, vectors: np.ndarray, k: int, where: str, per_file: bool) -> list[list[Row]]:
        """The k best rows of each vector [N, E], of which each is of another file if `per_file`."""
        if not len(vectors):
            return []
        count = min(query.FIRST + query.EACH * k, MOST) if per_file else k
        lists = self._search(vectors, count, where)
        if not per_file:
            return lists
        found = []
        for vector, rows in zip(vectors, lists, strict=True):
            best: dict[int, Row] = {}
            while True:
                for row in rows:
                    best.setdefault(row["file"], row)
                if len(best) >= k or len(rows) < count:  # there are no more
                    break
                rest = f"file not in {sorted(best)}"
                both = f"{where} and {rest}" if where else rest
                (rows,) = self._search(vector[None], count, both)
            found.append(sorted(best.values(), key=lambda row: -row["score"])[:k])
        return found

    def _search(self, vectors: np.ndarray, k: int, where: str) -> list[list[Row]]:
        return self._collections.nearest(vectors, k, where, HIT_FIELDS, self.vector_index)

    def _above_chance(self, known: Calibration, rows: list[Row]) -> list[Row]:
        """Those that have enough evidence for their text."""
        if not rows:
            return []
        scores = np.array([row["score"] for row in rows])
        vectors = self._collections.vectors([row["id"] for row in rows])
        enough = known.evidence(scores, vectors) >= known.limit
        return list(itertools.compress(rows, enough))

    def calibration(self) -> Calibration | None:
        """What `min_score="auto"` goes by; None in an index that is too small."""
        text = self._collections.read(calibration.KEY)
        return calibration.parse(text) if text else None

    def is_current(self) -> bool:
        """Whether it still has the vectors of the model that it was opened with."""
        return self._collections.info().model == self.info.model

    def changed(self) -> float | None:
        """None: the server does not tell when the last change was."""
        return None

    @property
    def folder(self) -> str:
        """The source of the videos; it may have moved since this index was opened."""
        return self._collections.info().folder

    def path_of(self, file_id: int) -> pathlib.Path | str:
        """Where a file was when it was indexed; raises UserError as `file_of`."""
        return sources.as_path(sources.locate(self.folder, self.file_of(file_id).path))

    def file_of(self, file_id: int) -> IndexedFile:
        """The row of a file.

        Raises:
            UserError: no indexed file has this id.
        """
        for row in self._collections.rows(FILES, f"id == {file_id}"):
            return indexed_file(row)
        raise UserError(f"file {file_id}: not in the index {self.name}")

    def counts(self) -> dict[str, int]:
        """Numbers of `files`, `moments` (with whole clips), `captions`, and `failed` files."""
        files = self._collections.count(FILES, READABLE)
        return {
            "files": files,
            "moments": self._collections.count(MOMENTS),
            "captions": 0,
            "failed": self._collections.count(FILES) - files,
        }

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of files that could not be read."""
        rows = self._collections.rows(FILES, 'reason != ""', ["path", "reason"])
        return sorted((row["path"], row["reason"]) for row in rows)

    def list_files(
        self,
        order: str,
        offset: int,
        limit: int,
        *,
        folder: str | None = None,
        since: Date = None,
        until: Date = None,
    ) -> tuple[int, list[ListedFile]]:
        """(number of files that pass the filter, some of them in an order of `ORDERS`).

        Milvus cannot sort, so this reads the rows of all files that pass.
        """
        where = expression(make_filter(folder, since, until))
        rows = self._collections.rows(FILES, f"{where} and {READABLE}" if where else READABLE)
        files = [
            ListedFile(
                row["id"], row["path"], row["mtime"] / 1e9, row["end"], max(row["moments"] - 1, 0)
            )
            for row in rows
        ]
        if order == "newest":
            files.sort(key=lambda file: (-file.modified, file.path))
        else:
            files.sort(key=lambda file: file.path)
        return len(files), files[offset : offset + limit]

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        """The first folders whose path continues a prefix; see `Listing.list_folders`."""
        parent = prefix[: prefix.rfind("/") + 1]
        first, last = quote(prefix), quote(prefix + "\U0010ffff")
        rows = self._collections.rows(
            FILES, f"path >= {first} and path < {last} and {READABLE}", ["path"]
        )
        inside = (row["path"] for row in rows if "/" in row["path"][len(parent) :])
        return sorted({path[: path.index("/", len(parent))] for path in inside})[:limit]

    def modified(self, ids: Iterable[int]) -> tuple[str, dict[int, float]]:
        """(the source of the videos, {id of a file: Unix time of its last change})."""
        listed = sorted(set(ids))
        rows: Iterable[Row] = ()
        if listed:
            rows = self._collections.rows(FILES, f"id in {listed}", ["id", "mtime"])
        return self.folder, {row["id"]: row["mtime"] / 1e9 for row in rows}

    def neighbours(self, file_id: int, start: float, end: float) -> Neighbours:
        """The moments before and after one of them; raises UserError as `Listing.neighbours`."""
        _, *rows = self._moments(file_id, start, end)
        return neighbours_among([(row["start"], row["end"]) for row in rows], (start, end))

    def moment_vector(self, file_id: int, start: float, end: float) -> np.ndarray:
        """float32 [E] of a moment; raises UserError as `Listing.moment_vector`."""
        rows = self._moments(file_id, start, end)
        chosen = next(row["id"] for row in rows if (row["start"], row["end"]) == (start, end))
        return self._collections.vectors([chosen])[0]

    def _moments(self, file_id: int, start: float, end: float) -> list[Row]:
        """The moments of a file, the whole clip first."""
        rows = self._collections.rows(
            MOMENTS, f"file == {file_id}", ["id", "number", "start", "end"]
        )
        ordered = sorted(rows, key=lambda row: row["number"])
        if (start, end) not in [(row["start"], row["end"]) for row in ordered]:
            raise UserError(f"file {file_id}: no moment from {start:g} to {end:g} s in the index")
        return ordered


def _hit(row: Row) -> Hit:
    return Hit(row["file"], row["path"], row["score"], row["start"], row["end"])
