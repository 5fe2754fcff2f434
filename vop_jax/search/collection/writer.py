"""Changes an index that lives in Milvus; `updater` writes through it as through a catalog."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from vop_jax.search import calibration
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.collection.schema import (
    FILES,
    MOMENTS,
    TINY,
    VERSION,
    Collections,
    among,
    file_id,
    moment_keys,
)
from vop_jax.search.scan import VideoFile
from vop_jax.search.stores.base import Snapshot, checked_vectors
from vop_jax.video.moments import Segment

if TYPE_CHECKING:
    from vop_jax.inference.retriever import Retriever

FILE_FIELDS = ("path", "size", "mtime", "digest", "reason", "moments")
AddedFile = tuple[VideoFile, str, Sequence[Segment], np.ndarray]


class CollectionWriter:
    """The files and moments of an index in Milvus, open to a run that changes some of them.

    Several writers may work at the same time as long as each changes other files.
    """

    def __init__(self, uri: str, info: IndexInfo, paths: Collection[str] | None = None):
        """Opens the index or creates it, and stores this `info`.

        Args:
            paths: the only files that this writer reads and changes, a worker's share; None: all.
                With them the index exists already.

        Raises:
            UserError: the database does not answer, or has other collections of these names.
        """
        self._dim = info.dim
        self._server = Collections(uri, write=True)
        try:
            stored = self._server.info()
            if stored is None or (
                paths is None and stored != dataclasses.replace(info, version=VERSION)
            ):
                self._server.create(info)
            self._rows = {row["path"]: row for row in self._read(paths)}
        except BaseException:
            self._server.close()
            raise
        self._all = paths is None
        self._paths: dict[str, set[str]] = {}  # of each content
        for path, row in self._rows.items():
            self._paths.setdefault(row["digest"], set()).add(path)

    def _read(self, paths: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of files."""
        for expression in [""] if paths is None else among("path", paths):
            yield from self._server.rows(FILES, FILE_FIELDS, expression)

    def close(self) -> None:
        """Closes the connection."""
        self._server.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Does nothing: each file is committed by its own row."""
        yield

    def files(self) -> dict[str, IndexedFile]:
        """All files by their paths, or those of this writer's share."""
        return {path: _indexed(row) for path, row in self._rows.items()}

    def twins(self, digest: str) -> list[IndexedFile]:
        """The readable files of this content."""
        rows = {path: self._rows[path] for path in self._paths.get(digest, ())}
        if not self._all:
            # What another worker has just added may be missing; then its content is read again.
            expression = next(among("digest", [digest]))
            found = self._server.query(
                FILES, expression, FILE_FIELDS, limit=16, consistency_level="Eventually"
            )
            rows = {row["path"]: row for row in found} | rows
        return [_indexed(row) for row in (rows[path] for path in sorted(rows))]

    def embedded(self, file: IndexedFile) -> tuple[list[Segment], np.ndarray]:
        """The segments of a file and their vectors, float32 [M, E]."""
        expression = f"file == {file.id}"
        prefix = moment_keys(file.path, file.digest or "", 1)[0].removesuffix("0")
        rows = {
            int(row["id"].removeprefix(prefix)): row
            for row in self._server.rows(MOMENTS, ["id", "start", "end", "vector"], expression)
            if row["id"].startswith(prefix)
        }
        ordered = [rows[number] for number in sorted(rows)]
        segments = [(row["start"], row["end"]) for row in ordered]
        return segments, np.array([row["vector"] for row in ordered], np.float32)

    def add_files(self, files: Sequence[AddedFile], frames: Sequence[Any] = ()) -> list[str]:
        """Adds files in place of those with the same paths; returns the keys of their moments.

        Args:
            files: (file, digest of its content, its M segments, their vectors [M, E]).
            frames: none; an index in Milvus does not keep them.

        Raises:
            UserError: a vector with NaN or of another width.
        """
        moments, rows = list[dict[str, Any]](), list[dict[str, Any]]()
        for file, digest, segments, vectors in files:
            own = {"file": file_id(file.path), "path": file.path}
            own |= {"size": file.size, "mtime": file.mtime}
            keys = moment_keys(file.path, digest, len(segments))
            vectors = checked_vectors(vectors, self._dim)
            moments += [
                {"id": key, **own, "start": float(start), "end": float(end), "vector": vector}
                for key, (start, end), vector in zip(keys, segments, vectors, strict=True)
            ]
            rows.append(_row(file, digest, float(segments[0][1]), len(segments)))
        self._server.upsert(MOMENTS, moments)
        self._commit(rows)
        return [moment["id"] for moment in moments]

    def add_unreadable(self, file: VideoFile, reason: str) -> None:
        """Adds a file that is not read again before it changes."""
        self._commit([_row(file, reason=reason)])

    def _commit(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows of files, then removes the moments that they replace."""
        self._server.upsert(FILES, rows)
        old = list[str]()
        for row in rows:
            replaced = self._rows.get(row["path"])
            if replaced and _keys(replaced) != (kept := _keys(row)):
                old += set(_keys(replaced)).difference(kept)
            self._forget(row["path"])
            self._rows[row["path"]] = row
            self._paths.setdefault(row["digest"], set()).add(row["path"])
        self._server.delete(MOMENTS, among("id", old))

    def _forget(self, path: str) -> None:
        if (row := self._rows.pop(path, None)) is not None:
            self._paths[row["digest"]].discard(path)

    def move(self, indexed: IndexedFile, file: VideoFile) -> None:
        """Gives indexed content another path or date."""
        segments, vectors = self.embedded(indexed)
        self.add_files([(file, indexed.digest or "", segments, vectors)])
        if file.path != indexed.path:
            self.remove([indexed.path])

    def remove(self, paths: Iterable[str]) -> None:
        """Removes files and their moments."""
        gone = list(paths)
        self._server.delete(FILES, among("path", gone))  # first: their moments count no more
        self._server.delete(MOMENTS, among("file", map(file_id, gone)))
        for path in gone:
            self._forget(path)

    def compact(self) -> None:
        """Removes the moments that killed runs have left, of contents that no file has."""
        named = {row["path"]: row for row in self._read()}
        count = sum(len(_keys(row)) for row in named.values())
        if self._server.count(MOMENTS) == count:
            return
        left = [
            row["id"]
            for row in self._server.rows(MOMENTS, ["id", "path"])
            if row["path"] not in named or row["id"] not in _keys(named[row["path"]])
        ]
        logging.info("%d moments that a killed run has left are removed", len(left))
        self._server.delete(MOMENTS, among("id", left))

    def calibrate(self, retriever: "Retriever") -> None:
        """Brings the minimum of scores up to date with the vectors, see `calibration`."""
        stored, new = self._server.calibration(), None
        if self._server.count(MOMENTS) >= calibration.MOMENTS:
            general = stored.general if stored else retriever.embed_text(calibration.GENERAL)
            captions = np.empty((0, self._dim), np.float32)
            new = calibration.calibrate(general, _Nearest(self._server), None, captions)
        if (new and new.as_json()) != (stored and stored.as_json()):
            self._server.set_calibration(new)


class _Nearest(Snapshot):
    """The vectors of all moments, as `calibrate` looks at them."""

    def __init__(self, server: Collections):
        self._server = server

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(keys str [N, k], scores float32 [N, k])."""
        found = self._server.search(queries, k, ["id"])
        keys = np.array([[fields["id"] for _, fields in hits] for hits in found])
        return keys, np.array([[score for score, _ in hits] for hits in found], np.float32)

    def __len__(self) -> int:
        return self._server.count(MOMENTS)

    def get(self, keys: np.ndarray) -> np.ndarray:
        """float32 [M, E] of keys [M]."""
        vectors = self._server.vectors(keys.tolist())
        return np.stack([vectors[key] for key in keys.tolist()])


def _row(
    file: VideoFile, digest: str = "", end: float = 0.0, count: int = 0, reason: str = ""
) -> dict[str, Any]:
    """The row of a file with `count` moments, the whole clip among them."""
    values = {"path": file.path, "id": file_id(file.path), "size": file.size, "mtime": file.mtime}
    values |= {"digest": digest, "end": end, "moments": count, "reason": reason}
    return values | {"vector": TINY}


def _keys(row: dict[str, Any]) -> list[str]:
    """The keys of the moments that a file's row names."""
    return moment_keys(row["path"], row["digest"], row["moments"])


def _indexed(row: dict[str, Any]) -> IndexedFile:
    digest, reason = row["digest"] or None, row["reason"] or None
    return IndexedFile(file_id(row["path"]), row["path"], row["size"], row["mtime"], digest, reason)
