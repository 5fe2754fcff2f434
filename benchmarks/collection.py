"""Searches of an index on a Milvus server, beside Milvus' own client.

    python -m benchmarks.collection --store=http://127.0.0.1:19530#bench --rows=1000000

Fills the index with random unit vectors around a thousand centres, unless it has them. A query
asks for the ten best files of a folder that has a tenth of the moments. The client asks for the ten
best moments with the same expression; both see what is some seconds old.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vop_jax.search.catalog import VERSION, IndexInfo
from vop_jax.search.collection import vector_index
from vop_jax.search.collection.index import CollectionIndex
from vop_jax.search.collection.schema import MOMENTS, Collections, expression
from vop_jax.search.collection.writer import CollectionWriter
from vop_jax.search.query import make_filter
from vop_jax.search.scan import VideoFile
from vop_jax.search.stores import client

FOLDERS, CENTRES, MOMENTS_OF_FILE = 10, 1000, 20
BATCH = 200  # files written at once


def draw(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit rows [count, dim] around common centres."""
    centres = np.random.default_rng(0).normal(size=(CENTRES, dim))
    random = np.random.default_rng(seed)
    rows = centres[random.integers(CENTRES, size=count)] + random.normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def fill(collections: Collections, rows: int, dim: int, kind: str) -> float:
    """Writes the moments; returns seconds."""
    collections.create(dim, vector_index.parse(kind))
    model = ("", "random", "random", "", "", "zero_shot", 12, dim)
    info = IndexInfo(VERSION, *model, 1.0, 1.0, "/videos", collections.uri, vector_index=kind)
    writer = CollectionWriter(collections, info, ())
    writer.begin()
    begin = time.perf_counter()
    files = rows // MOMENTS_OF_FILE
    for start in range(0, files, BATCH):
        count = min(BATCH, files - start)
        vectors = draw(count * MOMENTS_OF_FILE, dim, 1 + start)
        segments = [(float(i), float(i + 1)) for i in range(MOMENTS_OF_FILE)]
        writer.add_files(
            [
                (
                    VideoFile(f"{i % FOLDERS}/{i}.mp4", 1, i * 10**9),
                    f"{i:016d}",
                    segments,
                    vectors[(i - start) * MOMENTS_OF_FILE : (i - start + 1) * MOMENTS_OF_FILE],
                )
                for i in range(start, start + count)
            ]
        )
    writer.end()
    return time.perf_counter() - begin


def milliseconds(call: Callable[[np.ndarray], Any], queries: np.ndarray) -> str:
    """Median, and the slowest in twenty, as text."""
    times = []
    for query in queries:
        begin = time.perf_counter()
        call(query)
        times.append(1000 * (time.perf_counter() - begin))
    return f"{statistics.median(times):.1f} | {np.quantile(times, 0.95):.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.collection", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--store", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vector_index", default="FLAT")
    parser.add_argument("--queries", type=int, default=50)
    args = parser.parse_args(argv)
    collections = Collections(args.store)
    if not collections.exist():
        seconds = fill(collections, args.rows, args.dim, args.vector_index)
        print(f"{args.rows} moments written in {seconds:.0f} s")
    index = CollectionIndex(args.store, fresh=False)
    raw, (_, name) = client.connect(args.store, write=False), client.split(args.store)
    where = expression(make_filter("3"))
    params = index.vector_index.search_params(10)
    queries = draw(args.queries + 2, args.dim, 10**6)

    def own(query: np.ndarray) -> None:
        index.search(query[None], 10, folder="3")

    def all_files(query: np.ndarray) -> None:
        index.search(query[None], 10)

    def of_client(query: np.ndarray) -> None:
        raw.search(
            name,
            data=[query],
            limit=10,
            filter=where,
            output_fields=["path", "start", "end"],
            search_params=params,
            consistency_level="Bounded",
        )

    print(f"{collections.count(MOMENTS)} moments, {index.info.vector_index}")
    print("| search | median, ms | one in twenty, ms |")
    print("|---|---:|---:|")
    for label, call in (
        ("ten files of a folder", own),
        ("ten moments of a folder, Milvus' client", of_client),
        ("ten files of all", all_files),
    ):
        for query in queries[:2]:
            call(query)
        print(f"| {label} | {milliseconds(call, queries[2:])} |")


if __name__ == "__main__":
    main()
