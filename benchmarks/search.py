"""What the vectors of an index cost: adding, opening, and searching of a million.

    python -m benchmarks.search --index=/tmp/index
    python -m benchmarks.search --index=/tmp/index --ways    # other ways to multiply, on a CPU
    python -m benchmarks.search --index=/tmp/lite --store=/tmp/vectors.db --rows=100000
    python -m benchmarks.search --index=/tmp/server --store=http://localhost:19530

The vectors are random unit rows; an index that already holds as many is not filled again. A
search is timed after one of its kind, as a server sees it; the first one reads the file.
Opening is that of a fresh process, without its imports. Searches among allowed ids receive
them in a random order.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.build import absolute, locked
from vop_jax.search.catalog import VERSION, IndexInfo, read_info, reading
from vop_jax.search.index import Index
from vop_jax.search.scan import VideoFile
from vop_jax.search.stores.base import Snapshot, named_ids
from vop_jax.search.stores.heap import HeapSnapshot, open_store
from vop_jax.search.writer import CatalogWriter

K = 10
Row = tuple[str, str]  # what was done, and how long it took


def unit(rows: int, dim: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, dim), np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def fill(directory: str, store: str, rows: int, dim: int, batch: int) -> list[Row]:
    """Adds what is missing, a file of so many moments at once; the rate, without the drawing."""
    info = IndexInfo(VERSION, "", "c", "", "", "", "", 12, dim, 1.0, 1.0, "/", absolute(store))
    with (
        locked(pathlib.Path(directory)),
        contextlib.closing(CatalogWriter(directory, info)) as writer,
    ):
        seconds, stored = 0.0, sum(file.size for file in writer.files().values())
        if stored > rows:
            raise UserError(f"--index={directory}: holds {stored} vectors; must be {rows} or fewer")
        for start in range(stored, rows, batch):
            vectors = unit(min(batch, rows - start), dim, seed=start)
            begin = time.perf_counter()
            file = VideoFile(f"{start}.mp4", len(vectors), 0)
            with writer.transaction():
                segments = [(0.0, 1.0)] * len(vectors)
                writer.add_files([(file, str(start), segments, vectors)])
            seconds += time.perf_counter() - begin
    if stored == rows:
        return []
    what = f"put {rows - stored:,} in batches of {batch:,}"
    return [(what, f"{seconds:.1f} s, {(rows - stored) / seconds:,.0f} a second")]


def milliseconds(call: Callable[[], Any], repeats: int) -> str:
    """Of one call after a first: the best and the median."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begin))
    return f"{min(times):,.1f} ms, median {np.median(times):,.1f}"


def anonymous_megabytes() -> float:
    """Memory of this process that is no mapped file."""
    with open("/proc/self/status", encoding="ascii") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith("RssAnon"))
    return int(kilobytes) / 1000


def growth(call: Callable[[], Any]) -> float:
    """The most memory that a call holds besides mapped files, looked at every 2 ms, in MB."""
    before, most = anonymous_megabytes(), 0.0
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(call)
        while not done.done():
            most = max(most, anonymous_megabytes() - before)
            time.sleep(0.002)
    done.result()
    return most


def searches(directory: str, dim: int, repeats: int) -> list[Row]:
    """Opening, then every kind of search."""
    begin = time.perf_counter()
    index = Index(directory)
    rows = [("open the catalog", f"{time.perf_counter() - begin:.2f} s")]
    begin = time.perf_counter()
    index.open_vectors()
    rows.append(("open the vectors, which reads them", f"{time.perf_counter() - begin:.2f} s"))
    store, ids = snapshot(directory)
    queries = unit(32, dim, seed=10**9)
    begin = time.perf_counter()
    store.search(queries[:1], K)
    rows.append(("the first search", f"{time.perf_counter() - begin:.2f} s"))
    drawn = np.random.default_rng(0).permutation(ids)
    kinds: list[tuple[str, int, np.ndarray | None]] = [
        ("one query", 1, None),
        ("one query, half of the ids allowed", 1, drawn[: len(drawn) // 2]),
        ("one query, 100 ids allowed", 1, drawn[:100]),
        ("32 queries at once", 32, None),
    ]
    for name, count, allowed in kinds:

        def search(count: int = count, allowed: np.ndarray | None = allowed) -> None:
            store.search(queries[:count], K, allowed)

        rows.append((name, f"{milliseconds(search, repeats)}; {growth(search):,.0f} MB"))
    rows.append(("as brute force finds", "yes" if exact(store, queries[:2], drawn) else "NO"))
    index.close()
    return rows


def snapshot(directory: str) -> tuple[Snapshot, np.ndarray]:
    """(the vectors of an index, their ids)."""
    with reading(directory) as db:
        store = open_store(directory, read_info(db), "moments", write=False)
        return store.snapshot(db), named_ids(db, "moments")


def exact(store: Snapshot, queries: np.ndarray, ids: np.ndarray) -> bool:
    """Whether the best scores are those of all vectors, got one block after the other."""
    best = np.full((len(queries), K), -np.inf)
    for start in range(0, len(ids), 8192):
        similar = queries.astype(np.float64) @ store.get(ids[start : start + 8192]).T
        best = -np.sort(-np.concatenate([best, similar], axis=1), axis=1)[:, :K]
    return bool(np.allclose(store.search(queries, K)[1], best, atol=1e-6, rtol=0))


def ways(directory: str, dim: int, repeats: int) -> list[Row]:
    """One query with all mapped vectors of a folder, several ways, without choosing the best."""
    import jax

    store, _ = snapshot(directory)
    assert isinstance(store, HeapSnapshot)
    vectors = store.vectors
    query, size = unit(1, dim, seed=10**9)[0], 2**15
    starts = range(0, len(vectors), size)
    pool = ThreadPoolExecutor(2)
    on_jax = jax.jit(lambda vectors, query: vectors @ query)

    def blocks() -> None:
        for start in starts:
            np.dot(vectors[start : start + size], query)

    def threads() -> None:
        list(pool.map(lambda start: np.dot(vectors[start : start + size], query), starts))

    calls: dict[str, Callable[[], Any]] = {
        "NumPy, all at once": lambda: np.dot(vectors, query),
        "NumPy, blocks of 32,768": blocks,
        "NumPy, blocks in two threads of our own": threads,
        "NumPy, all at once, a matrix of 1 query": lambda: query[None] @ vectors.T,
        "jax, from the mapped file": lambda: on_jax(vectors, query).block_until_ready(),
    }
    return [(name, milliseconds(call, repeats)) for name, call in calls.items()]


def in_a_fresh_process(what: str, directory: str, dim: int, repeats: int) -> list[Row]:
    code = (
        "import json\nimport jax\njax.devices()\n"
        f"from benchmarks.search import {what}\n"
        f"print(json.dumps({what}({directory!r}, {dim}, {repeats})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [(name, value) for name, value in json.loads(done.stdout.splitlines()[-1])]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", required=True, help="made if it is not there")
    parser.add_argument("--store", default="", help="of a new one: FILE.db or http://HOST:PORT")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4096, help="vectors in one put")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ways", action="store_true", help="compare ways to multiply instead")
    args = parser.parse_args()
    try:
        rows = fill(args.index, args.store, args.rows, args.dim, args.batch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    what = "ways" if args.ways else "searches"
    rows += in_a_fresh_process(what, args.index, args.dim, args.repeats)
    print(f"{args.rows:,} x {args.dim}, k = {K}\n\n| what | time; memory |\n| --- | ---: |")
    for name, value in rows:
        print(f"| {name} | {value} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
