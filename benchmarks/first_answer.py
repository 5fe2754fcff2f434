"""Seconds to a first answer: whole processes, from their start on.

    python -m benchmarks.first_answer

The parts are: importing what a query needs; `search query` with a text, with an empty cache of
compiled programs and with a filled one; `serve` until it is ready, likewise; `--mode=params`. The
CLIP has random weights, the index random vectors. Every repeat runs all parts once, and the first
repeat, which reads the packages from the disk, is not reported.
"""

import argparse
import contextlib
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from benchmarks.prompt_sets import draw
from benchmarks.search import unit
from vop_jax.clip.weights import ClipFile, parameter_shapes, save_clip
from vop_jax.config.clip import PRESETS
from vop_jax.search.build import locked
from vop_jax.search.catalog import VERSION, IndexInfo
from vop_jax.search.scan import VideoFile
from vop_jax.search.writer import CatalogWriter

MOMENTS = 1000
Seconds = tuple[float, float]  # by the clock, and of all cores


def write_index(root: pathlib.Path, arch: str, dtype: str) -> pathlib.Path:
    """`root/index`, of random vectors, over a CLIP with random weights."""
    config, clip = PRESETS[arch], root / "clip.safetensors"
    params = draw(parameter_shapes(config), 0)
    save_clip(clip, params, config, source="random", source_sha256="")
    file, videos = ClipFile(clip), str(root)
    model = (str(clip), file.fingerprint, file.name, "", "", "zero_shot", 12, config.embed_dim)
    info = IndexInfo(VERSION, *model, 0.0, 0.0, videos, "", dtype)
    index = root / "index"
    vectors = unit(MOMENTS, config.embed_dim, 0)
    segments = [(float(i), float(i + 1)) for i in range(MOMENTS)]
    with (
        locked(index),
        contextlib.closing(CatalogWriter(index, info)) as writer,
        writer.transaction(),
    ):
        writer.add_files([(VideoFile("a.mp4", 1, 0), "digest", segments, vectors)])
    return index


def run(command: Sequence[str], env: Mapping[str, str], *, until_line: bool = False) -> Seconds:
    """Of a Python process, to its end, or to its first line, after which it is stopped."""
    before, begin = _cpu_seconds(), time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.readline() if until_line else process.stdout.read()
    wall = time.perf_counter() - begin
    if until_line:
        process.terminate()
    code = process.wait()
    process.stdout.close()
    if not output and code:
        raise SystemExit(f"{' '.join(command)}: ended with status {code}")
    return wall, _cpu_seconds() - before


def _cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(index: pathlib.Path, arch: str, cache: pathlib.Path) -> dict[str, Seconds]:
    """Each part once; programs are kept in new folders below `cache`."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    query = ["-m", "vop_jax.search", "query", "a dog catches a frisbee", f"--index={index}"]
    serve = ["-m", "vop_jax.serve", f"--index={index}", "--port=0"]
    params = ["-m", "vop_jax.main", "--config=demo", "--mode=params", f"--config.clip.arch={arch}"]
    times = {}
    times["imports of a query"] = run(["-c", "from vop_jax.search import open; print(1)"], env)
    for state in ("empty", "filled"):
        own = env | {"XDG_CACHE_HOME": f"{cache}/query"}
        times[f"query, {state} cache"] = run(query, own)
    for state in ("empty", "filled"):
        own = env | {"XDG_CACHE_HOME": f"{cache}/serve"}
        times[f"serve until ready, {state} cache"] = run(serve, own, until_line=True)
    times["params"] = run(params, env)
    return times


def table(repeats: Sequence[Mapping[str, Seconds]]) -> str:
    """Medians and best times, as Markdown."""
    rows = ["| process | median, s | best, s | of all cores, s |", "|---|---:|---:|---:|"]
    for part in repeats[0]:
        walls, cpu = zip(*(times[part] for times in repeats), strict=True)
        cells = (statistics.median(walls), min(walls), statistics.median(cpu))
        rows.append(f"| {part} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.first_answer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", choices=PRESETS, default="ViT-B/32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="after a first")
    args = parser.parse_args(argv)
    repeats = []
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        index = write_index(root, args.arch, args.dtype)
        for repeat in range(args.repeats + 1):
            repeats.append(measure(index, args.arch, root / f"cache{repeat}"))
    print(table(repeats[1:]))


if __name__ == "__main__":
    main()
