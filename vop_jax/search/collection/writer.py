"""Changes an index on a server, with the methods of `search.writer.CatalogWriter`."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vop_jax.search import calibration
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.collection import vector_index
from vop_jax.search.collection.schema import (
    FILES,
    MOMENTS,
    NO_VECTOR,
    REASON,
    Collections,
    file_id,
    indexed_file,
    moment_id,
)
from vop_jax.search.collection.vector_index import VectorIndex
from vop_jax.search.scan import VideoFile
from vop_jax.search.stores.base import Snapshot, checked_vectors
from vop_jax.search.stores.client import LISTED
from vop_jax.search.writer import Frames
from vop_jax.video.moments import Segment

if TYPE_CHECKING:
    from vop_jax.inference.retriever import Retriever

OPEN = "open"  # the key of a text that says whether a run may have left rows that no file names


class CollectionWriter:
    """The files and moments of an index, opened by a run or by one of its workers.

    The moments of a file are written first, then its row, which makes it count; then the moments
    of its old content go. What a killed run leaves between these is removed by the next one.
    """

    def __init__(
        self,
        server: Collections,
        info: IndexInfo,
        files: Iterable[IndexedFile],
        check: Callable[[], None] = lambda: None,
    ):
        """Opens it.

        Args:
            files: of the index, or of the part of it that this worker may meet.
            check: is called before each change and raises an error if this run may not write.
        """
        self._collections, self._info, self._check = server, info, check
        self._files = {file.path: file for file in files}
        self._moved: list[str] = []
        self._now: dict[str, IndexedFile] = {}  # with the changes of this writer
        self._twins = collections.defaultdict[str, list[IndexedFile]](list)
        self._note(self._files.values())

    def begin(self) -> bool:
        """Notes that a run has begun and what it goes by; whether an earlier one was killed."""
        killed = self._collections.read(OPEN) == "yes"
        self._collections.write(OPEN, "yes")
        self._collections.write("info", json.dumps(dataclasses.asdict(self._info)))
        return killed

    def end(self) -> None:
        """Removes what has moved, and notes that a run has left nothing behind."""
        self.remove(self._moved)
        self._collections.write(OPEN, "no")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Around changes; each of them is whole by itself."""
        self._check()
        yield

    def files(self) -> dict[str, IndexedFile]:
        """All files by their paths, as they were when this was opened."""
        return self._files

    def twins(self, digest: str) -> list[IndexedFile]:
        """The readable files that have this content now, as far as this writer knows."""
        return [file for file in self._twins[digest] if self._now.get(file.path) is file]

    def _note(self, files: Iterable[IndexedFile]) -> None:
        for file in files:
            self._now[file.path] = file
            if file.digest:
                self._twins[file.digest].append(file)

    def embedded(self, file: IndexedFile) -> tuple[list[Segment], np.ndarray]:
        """The segments of a file and their vectors, float32 [M, E]."""
        fields = ["id", "number", "start", "end", "vector"]
        rows = sorted(
            self._collections.rows(MOMENTS, f"file == {file.id}", fields),
            key=lambda row: row["number"],
        )
        own = [row for row in rows if row["id"] == moment_id(*_content(file), row["number"])]
        vectors = np.array([row["vector"] for row in own], np.float32)
        return [(row["start"], row["end"]) for row in own], vectors

    def embedded_frames(self, file: IndexedFile) -> Frames:
        """Not here: an index on a server keeps no frames."""
        raise NotImplementedError

    def add_files(
        self,
        files: Sequence[tuple[VideoFile, str, Sequence[Segment], np.ndarray]],
        frames: Sequence[Frames] = (),
    ) -> None:
        """Adds files in place of those with the same paths.

        Args:
            files: (file, digest of its content, its M segments, their vectors [M, E]).
            frames: empty.

        Raises:
            UserError: a vector with NaN or of another width; the server does not answer.
        """
        moments, rows = [], []
        for file, digest, segments, vectors in files:
            own = {"path": file.path, "file": file_id(file.path), "mtime": file.mtime}
            checked = checked_vectors(vectors, self._info.dim)
            for number, ((start, end), vector) in enumerate(zip(segments, checked, strict=True)):
                key = moment_id(file.path, digest, number)
                place = {"id": key, "number": number, "start": float(start), "end": float(end)}
                moments.append({**own, **place, "vector": vector})
            last = float(segments[0][1]) if segments else 0.0
            rows.append(_file_row(file, digest, "", last, len(segments)))
        self._collections.upsert(MOMENTS, moments)
        self._collections.upsert(FILES, rows)
        self._forget_old([row["path"] for row in rows], {row["id"] for row in moments})
        self._note(map(indexed_file, rows))

    def add_unreadable(self, file: VideoFile, reason: str) -> None:
        """Adds a file that is not read again before it changes."""
        # Milvus counts bytes.
        short = reason.encode()[:REASON].decode(errors="ignore")
        row = _file_row(file, "", short, 0.0, 0)
        self._collections.upsert(FILES, [row])
        self._note([indexed_file(row)])
        self._forget_old([file.path], set())

    def _forget_old(self, paths: Iterable[str], keep: set[str]) -> None:
        """Removes the moments that files had before this run, but for some of them."""
        unique = sorted(self._files[path].id for path in paths if path in self._files)
        for start in range(0, len(unique), LISTED):
            part = f"file in {unique[start : start + LISTED]}"
            ids = [row["id"] for row in self._collections.rows(MOMENTS, part, ["id"])]
            self._collections.delete(MOMENTS, [number for number in ids if number not in keep])

    def move(self, indexed: IndexedFile, file: VideoFile) -> None:
        """Gives indexed content another path or date."""
        segments, vectors = self.embedded(indexed)
        self.add_files([(file, indexed.digest or "", segments, vectors)])
        if file.path != indexed.path:
            self._moved.append(indexed.path)  # another worker may move it elsewhere, too

    def remove(self, paths: Iterable[str]) -> None:
        """Removes files and their moments."""
        paths = list(paths)
        # First the rows: a file that comes back must not be taken for an indexed one.
        self._collections.delete(FILES, [file_id(path) for path in paths])
        self._forget_old(paths, set())

    def sweep(self) -> None:
        """Removes moments that no file names, which a killed run has left."""
        files = {row["id"]: indexed_file(row) for row in self._collections.rows(FILES)}
        dead = []
        for row in self._collections.rows(MOMENTS, "", ["id", "file", "number"]):
            file = files.get(row["file"])
            if not file or row["id"] != moment_id(*_content(file), row["number"]):
                dead.append(row["id"])
        self._collections.delete(MOMENTS, dead)

    def calibrate(self, retriever: "Retriever") -> None:
        """Brings the minimum of scores up to date with the vectors, see `calibration`."""
        text = self._collections.read(calibration.KEY)
        stored, new = calibration.parse(text) if text else None, None
        if self._collections.count(MOMENTS) >= calibration.MOMENTS:
            general = stored.general if stored else retriever.embed_text(calibration.GENERAL)
            none = np.empty((0, self._info.dim), np.float32)
            best = _Best(self._collections, vector_index.parse(self._info.vector_index))
            new = calibration.calibrate(general, best, None, none)
        self._collections.write(calibration.KEY, new.as_json() if new else "")


class _Best(Snapshot):
    """The best moment of each general caption, as `calibration.calibrate` searches a snapshot."""

    def __init__(self, collections: Collections, kind: VectorIndex):
        self._collections, self._kind, self._ids = collections, kind, list[str]()

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        best = [hits[0] for hits in self._collections.nearest(queries, k, "", [], self._kind)]
        self._ids = [hit["id"] for hit in best]
        scores = np.array([[hit["score"]] for hit in best], np.float32)
        return np.arange(len(best))[:, None], scores

    def __len__(self) -> int:
        return self._collections.count(MOMENTS)

    def get(self, ids: np.ndarray) -> np.ndarray:
        unique = sorted(set(self._ids))
        vectors = dict(zip(unique, self._collections.vectors(unique), strict=True))
        return np.stack([vectors[self._ids[number]] for number in ids.tolist()])


def _content(file: IndexedFile) -> tuple[str, str]:
    return file.path, file.digest or ""


def _file_row(file: VideoFile, digest: str, reason: str, end: float, moments: int) -> dict:
    return {
        **{"id": file_id(file.path), "path": file.path, "size": file.size, "mtime": file.mtime},
        **{"digest": digest, "reason": reason, "end": end, "moments": moments},
        "vector": NO_VECTOR,
    }
