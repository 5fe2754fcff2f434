"""What ranks of a whole test split cost: time and peak memory, each size in a fresh process.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --sizes 27763x670 --grouped --dense
    python -m benchmarks.ranks --sizes 1000000x1000000    # for an accelerator

The rows are random unit vectors, captions shared out evenly. --grouped adds `v2t_grouped`, --dense
NumPy with the whole matrix of similarities, for comparison.
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


def measure(texts: int, videos: int, width: int, what: str) -> dict[str, Any]:
    """Seconds and peak bytes of this process, which should have done nothing before."""
    import numpy as np

    rng = np.random.default_rng(0)

    def unit(rows: int) -> np.ndarray:
        drawn = rng.standard_normal((rows, width), np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        return drawn

    text_rows, video_rows = unit(texts), unit(videos)
    owner = np.arange(texts) * videos // texts
    if what != "dense":
        from vop_jax.evaluation import ranks
    started = bytes_so_far()
    begin = time.perf_counter()
    if what == "blocks":
        mean = float(ranks.pair_ranks(text_rows, video_rows, owner)[0].mean())
    elif what == "grouped":
        mean = float(ranks.grouped_ranks(video_rows, text_rows, owner).mean())
    elif what == "dense":  # text to video alone, less than what blocks do
        similar = text_rows @ video_rows.T
        own = np.take_along_axis(similar, owner[:, None], axis=1)
        twice = (similar > own).sum(1) + (similar >= own).sum(1) - 1
        mean = float(1 + twice.mean() / 2)
    seconds = time.perf_counter() - begin
    measurement = {"seconds": seconds, "before": started, "peak": bytes_so_far(), "MnR": mean}
    return measurement | (on_device() if what != "dense" else {})


def on_device() -> dict[str, Any]:
    """The default device's kind, and its peak bytes where it counts them."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {"device": device.device_kind, "device_peak": stats.get("peak_bytes_in_use")}


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
    flops = 2.0 * texts * videos * width  # of the similarities, each once
    return {"size": size, "what": what, "flops": flops, **json.loads(done.stdout.splitlines()[-1])}


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| captions x videos | how | seconds | TFLOP/s | RSS before, MB | peak, MB | device, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['size'].replace('x', ' x ')} | {row['what']} | {row['seconds']:.1f} "
        f"| {row['flops'] / row['seconds'] / 1e12:.2f} | {row['before'] / 1e6:,.0f} "
        f"| {row['peak'] / 1e6:,.0f} | {megabytes(row.get('device_peak'))} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="TEXTSxVIDEOS")
    parser.add_argument("--width", type=int, default=512, help="E, of the embeddings")
    parser.add_argument("--grouped", action="store_true", help="also v2t_grouped")
    parser.add_argument("--dense", action="store_true", help="also NumPy with the whole matrix")
    args = parser.parse_args()
    ways = ["blocks", *["grouped"] * args.grouped, *["dense"] * args.dense]
    rows = [in_a_fresh_process(size, args.width, what) for size in args.sizes for what in ways]
    device = next((row["device"] for row in rows if "device" in row), "")
    print(f"E={args.width}, {platform.machine()}, {device}\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
