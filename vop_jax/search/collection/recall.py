"""How many of the nearest moments an index on a server finds, and how fast."""

import dataclasses
import time

import numpy as np
from tqdm import tqdm

from vop_jax.errors import UserError
from vop_jax.search.collection.index import CollectionIndex
from vop_jax.search.collection.schema import MOMENTS, Collections, Row
from vop_jax.search.stores.client import ROWS


@dataclasses.dataclass(frozen=True)
class Recall:
    """What was measured.

    Attributes:
        recall: share of the k nearest moments that the index finds, on average.
        queries, moments: numbers of them.
        median, slow: milliseconds of a query, and of the slowest in twenty.
    """

    recall: float
    queries: int
    moments: int
    median: float
    slow: float


def measure(uri: str, k: int = 10) -> Recall:
    """Compares searches by general captions with exact ones, for which it reads all vectors.

    Raises:
        UserError: there is no such index, or it is too small to have vectors of captions.
    """
    index = CollectionIndex(uri)
    known = index.calibration()
    if known is None:
        raise UserError(f"store {uri}: fewer than 50 moments; all are compared")
    collections = Collections(uri, fresh=False)
    found, times = [], []
    for query in known.general:
        begin = time.perf_counter()
        (hits,) = collections.nearest(query[None], k, "", [], index.vector_index)
        times.append(1000 * (time.perf_counter() - begin))
        found.append({hit["id"] for hit in hits})
    exact, moments = _exact(collections, known.general, k)
    shares = [len(own & best) / len(best) for own, best in zip(found, exact, strict=True)]
    median, slow = np.quantile(times, (0.5, 0.95))
    return Recall(float(np.mean(shares)), len(exact), moments, float(median), float(slow))


def _exact(collections: Collections, queries: np.ndarray, k: int) -> tuple[list[set[str]], int]:
    """(ids of the k nearest moments of each query [N, E], number of all moments)."""
    ids = np.empty((len(queries), 0), "U64")
    scores = np.empty((len(queries), 0), np.float32)
    rows = collections.rows(MOMENTS, "", ["id", "vector"])
    moments, part = 0, list[Row]()

    def merge() -> None:
        nonlocal ids, scores
        vectors = np.array([row["vector"] for row in part], np.float32)
        own = np.array([row["id"] for row in part])
        scores = np.concatenate([scores, queries @ vectors.T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(own, (len(queries), len(own)))], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, ids = (np.take_along_axis(x, best, axis=1) for x in (scores, ids))

    for row in tqdm(rows, "exact search", collections.count(MOMENTS), unit="moment"):
        moments += 1
        part.append(row)
        if len(part) == ROWS:
            merge()
            part = []
    if part:
        merge()
    return [set(row) for row in ids.tolist()], moments
