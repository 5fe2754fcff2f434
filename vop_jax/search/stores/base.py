"""The interface of a store of vectors."""

import sqlite3
from typing import Protocol

import numpy as np

from vop_jax.errors import UserError

NO_ID = -1  # fills the results of a search where a store has fewer than k vectors
TABLES = {"videos": "moments", "captions": "captions"}  # of the catalog, by the target of a search


class Snapshot(Protocol):
    """The vectors of one state of the catalog.

    It may also hold vectors that the catalog does not name any more, or does not name yet. Its
    methods raise UserError where vectors are damaged or a database does not answer.
    """

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The vectors with the largest inner products, best first, ties by smaller id.

        Args:
            queries: float32 [N, E].
            k: 1 or more.
            allowed: int64 ids to search among, in any order; None for all.

        Returns:
            (ids int64 [N, k], scores float32 [N, k]), filled up with -1 and -inf.
        """

    def get(self, ids: np.ndarray) -> np.ndarray:
        """float32 [M, E] of ids int64 [M]."""

    def check(self) -> None:
        """Compares all vectors with their checksums."""
        return

    def __len__(self) -> int:
        """The number of vectors."""


class VectorStore(Protocol):
    """Vectors by id, searched by inner product, exactly.

    The catalog says which vectors count; each method gets a connection to it. Only the process
    that writes the catalog changes a store. Changes raise OSError where the disk is full.
    """

    def snapshot(self, db: sqlite3.Connection) -> Snapshot:
        """The vectors of the state that a connection reads."""

    def append(self, db: sqlite3.Connection, vectors: np.ndarray) -> list[int]:
        """Adds float32 [M, E] and returns their ids, which no vector had before.

        They count once the open transaction is committed.
        """

    def lost(self, db: sqlite3.Connection) -> np.ndarray:
        """int64 ids that the catalog names and whose vectors are damaged or missing."""

    def is_sparse(self, db: sqlite3.Connection) -> bool:
        """Whether `compact` frees enough room to be worth a copy."""
        return False

    def compact(self, db: sqlite3.Connection) -> None:
        """Drops vectors that the catalog does not name; within a transaction; may change ids."""
        return

    def clean(self, db: sqlite3.Connection) -> None:
        """Removes what no committed transaction names; outside of a transaction."""

    def close(self) -> None:
        """Releases files and connections; a second call does nothing."""


def distinct(ids: np.ndarray) -> np.ndarray:
    """Sorted ids, each once; for half a million ids np.unique's hash table takes 0.1 s longer."""
    ids = np.sort(ids)
    return ids[np.diff(ids, prepend=NO_ID) != 0]


def checked_vectors(vectors: np.ndarray, dim: int) -> np.ndarray:
    """`vectors` as float32 [N, E].

    Raises:
        UserError: another shape, NaN or infinite values.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise UserError(f"vectors: shape {list(vectors.shape)}; must be [N, {dim}]")
    if not np.isfinite(vectors).all():
        raise UserError("vectors: NaN or infinite values; must be finite")
    return vectors


def named_ids(db: sqlite3.Connection, table: str) -> np.ndarray:
    """int64, sorted: all ids of moments or captions that the catalog names."""
    rows = db.execute(f"SELECT id FROM {table} ORDER BY id")
    return np.fromiter((row[0] for row in rows), np.int64)
