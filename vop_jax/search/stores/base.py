"""The vectors of an index: what a store is, and how one is named."""

import sqlite3
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vop_jax.errors import UserError

if TYPE_CHECKING:
    pass

MOST = 16_384  # results of one search that every store gives: Milvus' own limit
NO_ID = -1  # fills up the answers where a store holds fewer than k vectors
TABLES = {"videos": "moments", "captions": "captions"}  # of the catalog: whose vectors they are


class Snapshot(Protocol):
    """What can be searched in one state of the catalog.

    It may hold vectors that the catalog does not name any more, or does not name yet.
    """

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The vectors with the largest inner products, best first, ties by smaller id.

        Args:
            queries: float32 [Q, E].
            k: how many, 1 or more.
            allowed: int64 ids to which the search is restricted; None for all.

        Returns:
            (ids int64 [Q, k], scores float32 [Q, k]), filled up with -1 and -inf.

        Raises:
            UserError: vectors are damaged; a database does not answer.
        """

    def get(self, ids: np.ndarray) -> np.ndarray:
        """float32 [N, E] of ids [N].

        Raises:
            UserError: an id that is not there; as `search`.
        """

    def check(self) -> None:
        """Reads all of them, to compare them with their checksums.

        Raises:
            UserError: other bytes than were written.
        """

    def __len__(self) -> int:
        """How many vectors there are."""


class VectorStore(Protocol):
    """Vectors by id, searched by inner product, exactly.

    What of them counts is in the catalog, to which each method is given a connection. One
    process changes a store, the one that writes the catalog.
    """

    def snapshot(self, db: sqlite3.Connection) -> Snapshot:
        """What there is in the state that a connection reads."""

    def append(self, db: sqlite3.Connection, vectors: np.ndarray) -> np.ndarray:
        """Adds float32 [N, E]; they count once the transaction that is open is committed.

        Returns:
            Their ids, int64 [N]: none that was ever another's.

        Raises:
            UserError: a wrong shape, NaN, a damaged file.
            OSError: the disk is full.
        """

    def lost(self, db: sqlite3.Connection) -> np.ndarray:
        """int64 ids that the catalog names and whose vectors are damaged or gone."""

    def is_sparse(self, db: sqlite3.Connection) -> bool:
        """Whether `compact` is worth its while."""

    def compact(self, db: sqlite3.Connection) -> None:
        """Leaves out what the catalog does not name; within a transaction, may change ids.

        Raises:
            OSError: the disk is full.
        """

    def clean(self, db: sqlite3.Connection) -> None:
        """Removes what no transaction that was committed names; outside of one."""

    def close(self) -> None:
        """Lets go of files and connections; a second time does nothing."""


def checked_ids(ids: np.ndarray) -> np.ndarray:
    """ids as int64 [N].

    Raises:
        UserError: not whole numbers of 0 or more.
    """
    given = np.asarray(ids)
    if given.size == 0:
        return np.empty(0, np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise UserError(f"ids: {given.dtype} {list(given.shape)}; must be int64 [N]")
    whole = given.astype(np.int64)
    if whole.min() < 0:
        raise UserError(f"ids: {whole.min()}; must be 0 or more")
    return whole


def distinct(ids: np.ndarray) -> np.ndarray:
    """ids, each once and sorted; of half a million np.unique's hash table takes 0.1 s longer."""
    ids = np.sort(ids)
    return ids[np.diff(ids, prepend=NO_ID) != 0]


def checked_vectors(vectors: np.ndarray, dim: int, what: str = "vectors") -> np.ndarray:
    """vectors as float32 [N, E].

    Raises:
        UserError: another shape, NaN or infinite values.
    """
    given = np.asarray(vectors, np.float32)
    if given.ndim != 2 or given.shape[1] != dim:
        raise UserError(f"{what}: shape {list(given.shape)}; must be [N, {dim}]")
    if not np.isfinite(given).all():
        raise UserError(f"{what}: NaN or infinite values; must be finite")
    return given


def checked_k(k: int) -> int:
    """How many are asked for.

    Raises:
        UserError: fewer than one.
    """
    if k < 1:
        raise UserError(f"k={k}: must be 1 or more")
    return k


def named_ids(db: sqlite3.Connection, table: str) -> np.ndarray:
    """int64, sorted: all ids of moments or captions that the catalog names."""
    rows = db.execute(f"SELECT id FROM {table} ORDER BY id")
    return np.fromiter((row[0] for row in rows), np.int64)
