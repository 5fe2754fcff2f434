"""What an index costs besides its vectors: its catalog when searched, and decoding when made.

    python -m benchmarks.index catalog --index=/tmp/index
    python -m benchmarks.index decoding VIDEOS --workers=1,2

The catalog is synthetic: any number of moments, over files in folders and on days;
its vectors are narrow (--dim), so that a search of them is quick, and the time of `Index.search`
is stated next to that of the store alone. Opening is that of a fresh process, without its imports.

Decoding is timed in processes, which survive a decoder that crashes or hangs, and in threads; and
also each clip and moment alone, not all of a file in one pass.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vop_jax.search.catalog import VERSION, IndexInfo, reading
from vop_jax.search.index import Index
from vop_jax.search.scan import VideoFile, find_videos
from vop_jax.search.stores.heap import open_store
from vop_jax.search.writer import CatalogWriter
from vop_jax.video.moments import FrameSpec, decode_task, inspect_video, list_moments, plan_tasks
from vop_jax.video.workers import in_processes, in_threads

DAY = 86_400
BATCH = 1000  # files at once

OPEN = """
import time
from vop_jax.search.index import Index
begin = time.perf_counter()
index = Index({directory!r})
index.open_vectors()
opened = time.perf_counter() - begin
import numpy as np, jax
query = np.eye(1, index.info.dim, dtype=np.float32)
begin = time.perf_counter()
index.search(query, 10)
print(opened, time.perf_counter() - begin)
"""


def fill(directory: pathlib.Path, moments: int, per_file: int, dim: int) -> None:
    """A catalog of files that are not there, each in one of 100 folders and on its own day."""
    directory.mkdir(parents=True)
    info = IndexInfo(
        VERSION, "", "c", "CLIP", "", "", "zero_shot", 12, dim, 10.0, 5.0, "/films", ""
    )
    rng = np.random.default_rng(0)
    files = moments // per_file
    segments = [(5.0 * i, 5.0 * i + 10) for i in range(per_file)]
    with contextlib.closing(CatalogWriter(directory, info)) as writer:
        for first in range(0, files, BATCH):
            last = min(first + BATCH, files)
            rows = rng.standard_normal(((last - first) * per_file, dim), np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            added = []
            for i, vectors in enumerate(rows.reshape(-1, per_file, dim), first):
                mtime = i * DAY * 10**9 * 10_000 // files
                file = VideoFile(f"{i % 100:02}/{i}.mp4", 1, mtime)
                added.append((file, str(i), segments, vectors))
            with writer.transaction():
                writer.add_files(added)


def best(call: Callable, times: int = 7) -> float:
    """Milliseconds, of the middle one of several calls."""
    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        durations.append(1e3 * (time.perf_counter() - begin))
    return sorted(durations)[times // 2]


def measure_catalog(args: argparse.Namespace) -> None:
    directory = pathlib.Path(args.index)
    if not directory.exists():
        fill(directory, args.moments, args.per_file, args.dim)
    code = OPEN.format(directory=str(directory))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    opened, first = map(float, done.stdout.split())
    print(json.dumps({"open_ms": round(1e3 * opened, 1), "first_search_ms": round(1e3 * first)}))
    index = Index(directory)
    print(json.dumps({**index.counts(), "catalog_mb": _megabytes(directory / "catalog.sqlite")}))
    dim = index.info.dim
    with reading(directory) as db:
        store = open_store(directory, index.info, "moments", write=False).snapshot(db)
    rng = np.random.default_rng(1)
    query = rng.standard_normal((1, dim), np.float32)
    query /= np.linalg.norm(query)
    alone = best(lambda: store.search(query, 224))
    asked = {
        "no filter": {},
        "1 % by folder": {"folder": "07"},
        "1 % by date": {"since": 9_900 * DAY},
        "5 % by date": {"since": 9_500 * DAY},
        "half by date": {"since": 5_000 * DAY},
        "99 % by date": {"since": 100 * DAY},
        "both": {"folder": "07", "since": 5_000 * DAY},
    }
    for what, filters in asked.items():
        for per_file in (True, False):
            took = best(lambda f=filters, p=per_file: index.search(query, 10, per_file=p, **f))
            row = {"filter": what, "per_file": per_file, "search_ms": round(took, 1)}
            print(json.dumps({**row, "store_alone_ms": round(alone, 1)}), flush=True)


def _megabytes(path: pathlib.Path) -> float:
    return round(path.stat().st_size / 1e6, 1)


def measure_decoding(args: argparse.Namespace) -> None:
    spec = FrameSpec(12, 224)
    folder = args.videos
    surveys = [
        (f"{folder}/{f.path}", inspect_video(f"{folder}/{f.path}", spec))
        for f in find_videos(folder).files
    ]
    tasks = [
        task
        for path, seen in surveys
        for task in plan_tasks(path, seen, list_moments(seen, args.window, args.window / 2), spec)
    ] * args.repeat
    seconds = sum(seen.duration for _, seen in surveys) * args.repeat
    clips = sum(len(task.segments) or 1 for task in tasks)

    apart = [dataclasses.replace(task, segments=(one,)) for task in tasks for one in task.segments]
    apart += [task for task in tasks if task.times]

    def run(how: str, workers: int) -> float:
        begin = time.perf_counter()
        if how == "processes":
            results = in_processes(decode_task, tasks, workers, seconds=600)
        elif how == "processes, one by one":
            results = in_processes(decode_task, apart, workers, seconds=600)
        else:
            results = in_threads(decode_task, tasks, workers)
        for _ in results:
            pass
        return time.perf_counter() - begin

    one_each = sum(1 for _ in ThreadPoolExecutor(1).map(decode_task, tasks[:1]))
    assert one_each == 1  # files are in the cache, libraries loaded
    for round in range(args.rounds):
        for workers in map(int, args.workers.split(",")):
            for how in ("processes", "threads", "processes, one by one"):
                took = run(how, workers)
                row = {"round": round, "how": how, "workers": workers, "seconds": round_(took)}
                row |= {"video_seconds_per_s": round_(seconds / took)}
                print(
                    json.dumps({**row, "clips_and_moments_per_s": round_(clips / took)}), flush=True
                )


def round_(number: float) -> float:
    return float(f"{number:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    catalog = commands.add_parser("catalog")
    catalog.add_argument("--index", required=True, help="made if it is not there")
    catalog.add_argument("--moments", type=int, default=1_000_000)
    catalog.add_argument("--per_file", type=int, default=20)
    catalog.add_argument("--dim", type=int, default=8)
    decoding = commands.add_parser("decoding")
    decoding.add_argument("videos")
    decoding.add_argument("--window", type=float, default=4.0)
    decoding.add_argument("--workers", default="1,2")
    decoding.add_argument("--repeat", type=int, default=8)
    decoding.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    {"catalog": measure_catalog, "decoding": measure_decoding}[args.command](args)


if __name__ == "__main__":
    main()
