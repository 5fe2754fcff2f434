"""The default store: a folder with a memory-mapped file of vectors, searched exactly."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from vop_jax.errors import UserError
from vop_jax.search.mapped import CHANGE, DELETED, VECTOR, Folder
from vop_jax.search.store import (
    NO_ID,
    checked_ids,
    checked_k,
    checked_pairs,
    checked_vectors,
    distinct,
)

if TYPE_CHECKING:
    import jax

SLACK = 1024  # dead rows that are not worth a compaction


@dataclass(frozen=True)
class View:
    """What was in the store at one moment; never changed.

    Attributes:
        vectors: float32 [M, E], mapped, rows that are dead now among them.
        ids: int64 [N], sorted.
        rows: int64 [N], where each id's vector is.
    """

    vectors: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    def positions(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(where in `self.ids` they are or would be, which are there)."""
        at = np.searchsorted(self.ids, ids)
        if not len(self.ids):
            return at, np.zeros(len(ids), bool)
        return at, self.ids[np.minimum(at, len(self.ids) - 1)] == ids

    def changed(self, ids: np.ndarray, rows: np.ndarray, vectors: np.ndarray) -> "View":
        """With new rows, or `DELETED`, of unique ids [n]."""
        order = np.argsort(ids)
        ids, rows = ids[order], rows[order]
        at, there = self.positions(ids)
        old = self.rows.copy()
        old[at[there]] = rows[there]
        all_ids = np.insert(self.ids, at[~there], ids[~there])
        all_rows = np.insert(old, at[~there], rows[~there])
        if (rows == DELETED).any():
            alive = all_rows != DELETED
            all_ids, all_rows = all_ids[alive], all_rows[alive]
        return View(vectors, all_ids, all_rows)

    @cached_property
    def placed(self) -> "jax.Array | None":
        """The vectors by id on a GPU or TPU, put there for the first search; else None."""
        from vop_jax.search import nearest

        return nearest.place(self.vectors, self.rows)

    def __len__(self) -> int:
        return len(self.ids)

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `store.Snapshot`."""
        from vop_jax.search import nearest

        queries, k = checked_vectors(queries, self.vectors.shape[1], "queries"), checked_k(k)
        allowed = None if allowed is None else checked_ids(allowed)
        ids = np.full((len(queries), k), NO_ID, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        positions = None
        if allowed is not None:
            at, there = self.positions(distinct(allowed))
            positions = at[there]
        found = min(k, len(self.ids) if positions is None else len(positions))
        if not found or not len(queries):
            return ids, scores
        if self.placed is not None:
            at, best = nearest.on_device(self.placed, positions, queries, found)
        else:
            rows = self.rows if positions is None else self.rows[positions]
            at, best = nearest.on_host(self.vectors, rows, queries, found)
            at = at if positions is None else positions[at]
        ids[:, :found], scores[:, :found] = self.ids[at], best
        return ids, scores


class ExactStore:
    """A `VectorStore` in a folder. Any number of threads may search it, one may change it."""

    def __init__(self, folder: str | os.PathLike, dim: int, *, write: bool):
        self._folder = Folder(folder, dim, write=write)
        self._dim = dim
        self._compacts = True
        self._view = self._empty().changed(*_last(self._folder.changes), self._folder.vectors)

    def __len__(self) -> int:
        return len(self._view.ids)

    def ids(self) -> np.ndarray:
        """All ids, int64, sorted."""
        return self._view.ids.copy()

    def get(self, ids: np.ndarray) -> np.ndarray:
        """float32 [N, E] of ids [N]."""
        view, ids = self._view, checked_ids(ids)
        at, there = view.positions(ids)
        if not there.all():
            raise UserError(f"store {self._folder.path}: has no id {ids[~there][0]}")
        return np.array(view.vectors[view.rows[at]], np.float32)

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k of all or of the allowed ids, see `store.Snapshot`."""
        return self._view.search(queries, k, allowed)

    def put(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Adds or replaces vectors; a kill at any time leaves all of them or none."""
        ids, vectors = checked_pairs(ids, vectors, self._dim)
        self._change(ids, self._folder.head.rows + np.arange(len(ids)), vectors)

    def delete(self, ids: np.ndarray) -> None:
        """Forgets ids; those that are not there are passed over."""
        ids = distinct(checked_ids(ids))
        ids = ids[self._view.positions(ids)[1]]
        self._change(ids, np.full(len(ids), DELETED), np.empty((0, self._dim), np.float32))

    def refresh(self) -> View:
        """Shows what a writer has written since; see `VectorStore.refresh`."""
        anew, changes = self._folder.refresh()
        if anew or len(changes):
            view = self._empty() if anew else self._view
            self._view = view.changed(*_last(changes), self._folder.vectors)
        return self._view

    def close(self) -> None:
        """Lets go of the lock, and of the mapped file once no search uses it."""
        self._folder.close()
        self._folder.vectors = np.empty((0, self._dim), np.float32)
        self._view = self._empty()

    def _empty(self) -> View:
        none = np.empty(0, np.int64)
        return View(self._folder.vectors, none, none)

    def _change(self, ids: np.ndarray, rows: np.ndarray, vectors: np.ndarray) -> None:
        folder = self._folder
        if not folder.writable:
            raise UserError(f"store {folder.path}: is open to read only")
        if not len(ids):
            return
        changes = np.stack([ids, rows], axis=1)
        folder.append(np.ascontiguousarray(vectors, VECTOR), np.ascontiguousarray(changes, CHANGE))
        self._view = view = self._view.changed(ids, rows, folder.vectors)
        if self._compacts and folder.head.rows > 2 * len(view.ids) + SLACK:
            self._compact(view)

    def _compact(self, view: "View") -> None:
        """Leaves dead rows behind; in the order of ids, as a device wants them."""
        try:
            self._folder.compact(view.ids, view.rows)
        except OSError as error:  # what was asked for is stored all the same
            self._compacts = False
            logging.warning(
                "store %s: dead rows stay, %s", self._folder.path, error.strerror or error
            )
            return
        self._view = View(self._folder.vectors, view.ids, np.arange(len(view.ids)))


def _last(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, rows) of changes [n, 2]; of several of one id the last one counts."""
    changes = changes.astype(np.int64)
    ids, back = np.unique(changes[::-1, 0], return_index=True)
    return ids, changes[::-1, 1][back]
