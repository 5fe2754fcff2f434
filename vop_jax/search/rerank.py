"""Ranks the nearest moments again, by the frame of each that is nearest to the query."""

import dataclasses
import sqlite3

import numpy as np

from vop_jax.search.query import Hit
from vop_jax.search.stores.base import Snapshot

CANDIDATES = 100  # moments that are ranked again, or k if that is more


def rerank(
    db: sqlite3.Connection, frames: Snapshot, vector: np.ndarray, hits: list[Hit], k: int
) -> list[Hit]:
    """The best k hits by the mean of their own score and that of their best frame.

    Args:
        frames: the rows of the table `frames`, [F * E] each.
        vector: float32 [E] of the query.
        hits: moments, which get this score and the seconds of the frame.
    """
    if not hits:
        return []
    statement = (
        "SELECT frames.id, seconds FROM frames JOIN moments ON moments.id = moment "
        'WHERE file = ? AND start = ? AND "end" = ?'
    )
    rows = [db.execute(statement, (hit.file_id, hit.start, hit.end)).fetchone() for hit in hits]
    ids = np.array([row[0] for row in rows], np.int64)
    scores = frames.get(ids).reshape(len(hits), -1, len(vector)) @ vector  # [M, F]
    best = scores.argmax(axis=1)
    ranked = [
        dataclasses.replace(
            hit,
            score=(hit.score + float(own[number])) / 2,
            frame=float(np.frombuffer(row[1], "<f4")[number]),
        )
        for hit, own, number, row in zip(hits, scores, best, rows, strict=True)
    ]
    return sorted(ranked, key=lambda hit: -hit.score)[:k]
