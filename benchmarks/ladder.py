"""The motion benchmark: every method, learning rate or ablation over one CLIP and one set of clips.

    python -m benchmarks.ladder --workdir=DIR                            # quick: the demo's size
    python -m benchmarks.ladder --workdir=DIR --config=configs/motion.py --seeds=0,1,2
    python -m benchmarks.ladder --workdir=DIR --study=learning_rates     # on the val split
    python -m benchmarks.ladder --workdir=DIR --study=ablations

The clips whose captions differ in direction only are each other's reversal, so their frames are
the same set: what averages frames that know nothing of each other tells them apart half of the
time, by chance. Runs that are finished already are read, not repeated.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from benchmarks.step_cost import counted_flops
from vop_jax import cli, report
from vop_jax.config.base import RESUMABLE, SUMMARY_FILE, first_difference
from vop_jax.config.clip import preset
from vop_jax.data import load
from vop_jax.data.records.write import WriteOptions
from vop_jax.errors import UserError
from vop_jax.experiment import train
from vop_jax.model import TextVideoModel
from vop_jax.storage import files, hub
from vop_jax.tuning import methods
from vop_jax.tuning.methods import METHODS

RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # the same for every method

Settings = Mapping[str, Any]  # {"method.name": "vop_p", "train.learning_rate": 0.01, …}


def _methods() -> dict[str, Settings]:
    return {name: {"method.name": name} for name in METHODS}


def _learning_rates(rates: Sequence[float] = RATES) -> dict[str, Settings]:
    """On the validation split."""
    return {
        f"{name} {rate:g}": {
            "method.name": name,
            "train.learning_rate": rate,
            "data.eval_split": "val",
        }
        for name in METHODS
        if name != "zero_shot"
        for rate in rates
    }


def _ablations() -> dict[str, Settings]:
    """The paper's, at the depth of the demo's towers; `methods` holds the values in between."""

    def varied(method: str, key: str, *values: Any) -> dict[str, Settings]:
        return {
            f"{method} {key.split('.')[-1]}={value}": {"method.name": method, key: value}
            for value in values
        }

    lengths = {
        f"vop length={length}": {
            "method.name": "vop",
            "method.visual_prompts": length,
            "method.text_prefix": length // 2,
            "method.text_suffix": length // 2,
        }
        for length in (2, 4, 16)
    }
    return {
        **varied("vop_f+c", "method.split_layer", 1, 3),
        **varied("vop_f", "method.split_layer", 0, 1, 3),
        **varied("vop_f", "method.frame_position", False),
        **varied("vop_c", "method.cmm", "lstm", "transformer"),
        **varied("vop_c", "method.cmm_role", "cls"),
        **varied("vop", "method.branches", "visual", "text"),
        **varied("vop_p", "method.specific_prompts", 2, 6, 8),
        **varied("vop", "method.last_layer", 1, 2, 3),
        **lengths,
    }


STUDIES: dict[str, Callable[[], dict[str, Settings]]] = {
    "methods": _methods,
    "learning_rates": _learning_rates,
    "ablations": _ablations,
}


def run_study(
    config_file: str,
    workdir: str,
    study: str,
    seeds: list[int],
    *,
    only: list[str] | None = None,
    rates: Sequence[float] = RATES,
    steps: int | None = None,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Runs what is not there yet; one row per label, see `report.grouped`, with costs.

    Args:
        config_file: with a `get_config(method)`, as under `configs/`.
        workdir: everything goes below it: one CLIP, one set of clips, a folder per run.
        only: of these methods.
        rates: of the study of that name.
        steps: instead of the config's.
        jobs: runs at a time, each a process of its own; small ones leave an accelerator idle.

    Raises:
        UserError: there is no such file, or a run cannot be as it says.
    """
    if not os.path.isfile(config_file):
        raise UserError(f"--config={config_file}: no such file")
    get_config = runpy.run_path(config_file)["get_config"]
    use_compile_cache(workdir)
    backbone = _backbone(get_config("zero_shot"), workdir)
    asked: dict[str, list[tuple[ConfigDict, str]]] = {}  # (config, folder) of a label's runs
    settings_of = _learning_rates(rates) if study == "learning_rates" else STUDIES[study]()
    for label, settings in settings_of.items():
        if only and settings["method.name"] not in only:
            continue
        asked[label] = []
        for seed in seeds if settings["method.name"] != "zero_shot" else seeds[:1]:
            config = get_config(settings["method.name"])
            config.seed = seed
            config.update_from_flattened_dict(backbone | dict(settings))
            if steps is not None:
                config.train.steps = steps
            split = config.data.eval_split
            config.data.records = os.path.join(workdir, f"records_{split}")
            run = os.path.join(workdir, study, label.replace(" ", "_"), f"seed{seed}")
            asked[label].append((config, run))
    if jobs > 1:
        _run_side_by_side([pair for pairs in asked.values() for pair in pairs], workdir, jobs)
    rows = []
    for label, pairs in asked.items():
        runs = [_run(config, run) for config, run in pairs]
        (row,) = report.grouped(runs, labels={run.workdir: label for run in runs})
        rows.append(row | _cost(runs[0].config))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def use_compile_cache(workdir: str) -> None:
    """Seeds of one setting run the same programs."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compiled"))


def _backbone(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Pre-trains the CLIP and renders the clips once; what all runs then say of them."""
    shared = os.path.join(workdir, "shared")
    videos = os.path.join(workdir, "videos")
    config.data.videos = videos
    if not os.path.exists(os.path.join(shared, hub.CLIP_FILE)):
        train.train(config, shared)
    return {"init.clip": os.path.join(shared, hub.CLIP_FILE), "data.videos": videos}


def _finished(run: str, config: ConfigDict) -> bool:
    if not os.path.exists(os.path.join(run, SUMMARY_FILE)):
        return False
    theirs = report.read_run(run).config
    ignored = {*RESUMABLE, *(["compute.dtype"] if config.compute.dtype == "auto" else [])}
    return first_difference(config, theirs, ignored) is None


def _run(config: ConfigDict, run: str) -> report.FinishedRun:
    if not _finished(run, config):
        logging.info("%s", run)
        train.train(config, run)
    return report.read_run(run)


def _run_side_by_side(pairs: list[tuple[ConfigDict, str]], workdir: str, jobs: int) -> None:
    """Runs what is not there yet."""
    pairs = sorted(pairs, key=lambda pair: pair[0].seed)  # stopped early, all have as many
    pairs = [(config, run) for config, run in pairs if not _finished(run, config)]
    if not pairs:
        return
    _pack(*pairs[0])
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawned, use_compile_cache, (workdir,)) as pool:
        try:
            for done in [pool.submit(_run, *pair) for pair in pairs]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what waits is not begun
            raise


def _pack(config: ConfigDict, run: str) -> None:
    """Makes the records that all runs read, in as many processes as there are cores."""
    load.load(config.data, run, select=config.train.select, options=WriteOptions())


def _cost(config: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs and milliseconds of embedding one clip, on this machine's first device."""
    full = ConfigDict(config)
    clip = preset(full)
    model = TextVideoModel(clip, methods.method_of(full))
    batch = full.eval.batch_size
    frames = np.zeros((batch, full.data.frames, clip.image_size, clip.image_size, 3), np.uint8)
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]

    def encode(params, frames):
        return model.apply({"params": params}, frames, method="encode_video")

    compiled = jax.jit(encode).lower(params, frames).compile()
    flops = counted_flops(encode, params, frames)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        compiled(params, frames).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return {
        "gflop_per_clip": flops / batch / 1e9,
        "ms_per_clip": 1e3 * min(seconds[1:]) / batch,
    }


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def comma_separated(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return comma_separated


def _method(name: str) -> str:
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r}: allowed are {', '.join(METHODS)}")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--study", default="methods", choices=STUDIES)
    parser.add_argument("--seeds", type=_listed(int), default=[0], help="0,1,2")
    parser.add_argument("--methods", type=_listed(_method), help="only these: vop,vop_p")
    parser.add_argument(
        "--rates", type=_listed(float), default=RATES, help="of --study=learning_rates: 0.01,0.03"
    )
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one device")
    parser.add_argument("--output", help="PREFIX.json and PREFIX.md; default: in the workdir")
    args = parser.parse_args()
    cli.set_up_logging()
    if args.jobs > 1:  # else the first process takes most of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(cli.run(lambda: measure(args), resumes=True))


def measure(args: argparse.Namespace) -> int:
    """Runs the study, prints and writes its table; the exit status."""
    begin = time.time()
    rows = run_study(
        args.config,
        args.workdir,
        args.study,
        args.seeds,
        only=args.methods,
        rates=args.rates,
        steps=args.steps,
        jobs=args.jobs,
    )
    print(f"{(time.time() - begin) / 60:.1f} minutes")
    output = args.output or os.path.join(args.workdir, args.study)
    reported = [{key: value for key, value in row.items() if key != "workdirs"} for row in rows]
    files.write_json(f"{output}.json", reported)
    table = report.markdown(rows)
    files.write_atomic(f"{output}.md", table.encode())
    print(table)
    return 0


if __name__ == "__main__":
    main()
