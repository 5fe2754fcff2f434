"""What ranks of a whole test split cost: time and peak memory, each size in a fresh process.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --sizes 27763x670 --dense

The rows are random unit vectors, captions shared out evenly. --dense adds NumPy with the whole
matrix of similarities, for comparison.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from typing import Any

SIZES = ("1000x1000", "27763x670", "59800x2990")  # MSR-VTT 1k-A, MSVD, MSR-VTT's full test split


def measure(texts: int, videos: int, width: int, what: str) -> dict[str, float]:
    """Seconds and peak bytes of this process, which should have done nothing before."""
    import numpy as np

    rng = np.random.default_rng(0)

    def unit(rows: int) -> np.ndarray:
        drawn = rng.standard_normal((rows, width), np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    text_rows, video_rows = unit(texts), unit(videos)
    owner = np.arange(texts) * videos // texts
    if what == "blocks":
        from vop_jax.retrieval import metrics
    started = bytes_so_far()
    begin = time.perf_counter()
    if what == "blocks":
        ranks = metrics.rank_pairs(text_rows, video_rows, owner)
        mean = float(ranks.t2v.mean())
    elif what == "dense":  # text to video alone, less than what blocks do
        similar = text_rows @ video_rows.T
        own = np.take_along_axis(similar, owner[:, None], axis=1)
        twice = (similar > own).sum(1) + (similar >= own).sum(1) - 1
        mean = float(1 + twice.mean() / 2)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "before": started, "peak": bytes_so_far(), "MnR": mean}


def bytes_so_far() -> int:
    """The largest resident size of this process until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_a_fresh_process(size: str, width: int, what: str) -> dict[str, Any]:
    texts, videos = map(int, size.split("x"))
    code = (
        "import json\nfrom benchmarks.ranks import measure\n"
        f"print(json.dumps(measure({texts}, {videos}, {width}, {what!r})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"size": size, "what": what, **json.loads(done.stdout.splitlines()[-1])}


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| captions x videos | how | seconds | RSS before, MB | peak RSS, MB |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['size'].replace('x', ' x ')} | {row['what']} | {row['seconds']:.1f} "
        f"| {row['before'] / 1e6:,.0f} | {row['peak'] / 1e6:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="TEXTSxVIDEOS")
    parser.add_argument("--width", type=int, default=512, help="E, of the embeddings")
    parser.add_argument("--dense", action="store_true", help="also NumPy with the whole matrix")
    args = parser.parse_args()
    ways = ("blocks", "dense") if args.dense else ("blocks",)
    rows = [in_a_fresh_process(size, args.width, what) for size in args.sizes for what in ways]
    print(f"E={args.width}, {platform.machine()}\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
