"""Vectors by id: what a store is, and how one is named."""

import os
from typing import Protocol

import numpy as np

from vop_jax.errors import UserError

MOST = 16_384  # results of one search that every store gives: Milvus' own limit
NO_ID = -1  # fills up the answers where a store holds fewer than k vectors


class Snapshot(Protocol):
    """What can be searched at one moment, as far as a store tells moments apart."""

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
        """

    def __len__(self) -> int:
        """How many vectors there are."""


class VectorStore(Snapshot, Protocol):
    """Vectors by id, searched by inner product, exactly.

    An id is an int64 of 0 or more; a vector is float32 and finite. Who may write and read at the
    same time, and what readers see of it, is the store's own matter: see docs/search.md.
    """

    def put(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Adds or replaces vectors [N, E]; when this returns, a kill does not lose them.

        Of an id given twice the last vector counts.

        Raises:
            UserError: wrong shapes, NaN, a full disk, opened to read only.
        """

    def delete(self, ids: np.ndarray) -> None:
        """Forgets ids; those that are not there are passed over."""

    def get(self, ids: np.ndarray) -> np.ndarray:
        """float32 [N, E] of ids [N].

        Raises:
            UserError: an id that is not there.
        """

    def refresh(self) -> Snapshot:
        """Shows what others have written since; searches that are under way are not disturbed.

        Returns:
            What there is now: the same object as before where nothing was written.
        """

    def ids(self) -> np.ndarray:
        """All ids, int64, sorted."""

    def close(self) -> None:
        """Lets go of files, locks and connections; a second time does nothing."""


def open_store(uri: str | os.PathLike, dim: int, *, write: bool) -> VectorStore:
    """Opens a store by its name.

    Args:
        uri: a folder (exact search over a memory-mapped file); a file ending ".db" or
            "milvus-lite:FILE" (Milvus Lite); "http://HOST:PORT" or "https://…" (a Milvus server);
            of Milvus with #COLLECTION behind it, else "vop_jax".
        dim: E, the width of the vectors.
        write: to change it, as the only one; it is made if it is not there.

    Raises:
        UserError: no such store, one of another width, another writer, a missing extra, a
            database that does not answer.
    """
    uri = os.fspath(uri)
    local, _, _ = uri.partition("#")
    if not uri:
        raise UserError("store: its name is empty; give a folder, FILE.db or http://HOST:PORT")
    if uri.startswith(("milvus-lite:", "http://", "https://")) or local.endswith(".db"):
        from vop_jax.search.milvus import MilvusStore

        return MilvusStore(uri, dim, write=write)
    if "://" in uri:
        raise UserError(f"store {uri}: must be a local folder, FILE.db or http(s)://HOST:PORT")
    from vop_jax.search.exact import ExactStore

    return ExactStore(uri, dim, write=write)


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


def checked_pairs(ids: np.ndarray, vectors: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """What `put` is given, without the earlier ones of an id that occurs twice.

    Raises:
        UserError: as the two checks above; more or fewer ids than vectors.
    """
    ids, vectors = checked_ids(ids), checked_vectors(vectors, dim)
    if len(ids) != len(vectors):
        raise UserError(f"put: {len(ids)} ids for {len(vectors)} vectors; must be as many")
    last = np.sort(len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1])
    return (ids, vectors) if len(last) == len(ids) else (ids[last], vectors[last])


def checked_k(k: int) -> int:
    """How many are asked for.

    Raises:
        UserError: fewer than one.
    """
    if k < 1:
        raise UserError(f"k={k}: must be 1 or more")
    return k
