"""What a run writes about its results: summary, rankings, and tables for people."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from vop_jax.config.base import RANKINGS_FILE, SUMMARY_FILE
from vop_jax.data.datasets import registry
from vop_jax.evaluation.evaluate import Evaluation
from vop_jax.evaluation.metrics import recall_intervals
from vop_jax.experiment import setup
from vop_jax.experiment.counts import count
from vop_jax.experiment.inputs import Data, by_chance
from vop_jax.storage import files
from vop_jax.training.writer import MEASURED_ON, read_metrics

# {"t2v": {"R@1": …, "MdR": …}, "v2t": …}, see `evaluate.Evaluation.results`
Results = dict[str, dict[str, float]]


def write_summary(
    run: setup.Run,
    data: Data,
    before: Results | None,
    after: Evaluation,
    selected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes summary.json and rankings.jsonl; returns the summary."""
    _write_rankings(run, data, after)
    true, paper = count(run.clip.config, run.method)
    speeds = [
        line["videos_per_second"]
        for line in read_metrics(run.workdir)
        if "videos_per_second" in line
    ]
    summary = {
        "method": run.method.name,
        "steps": int(run.state.step),
        "extended_at": run.meta.get("extended_at", []),
        "trainable_params": true,
        "paper_params": paper,
        **after.results,
        "intervals": {side: recall_intervals(*queries) for side, queries in after.queries.items()},
        "before": before,
        "num_texts": data.num_texts,
        "num_videos": data.num_videos,
        "dataset": run.config.data.kind,
        "protocol": protocol(run.config.data.kind),
        "eval_split": run.config.data.eval_split,
        "selected": selected,
        "missing_videos_count_as": run.config.eval.missing,
        "videos_per_second": float(np.median(speeds)) if speeds else None,
        "skipped_videos": data.packed.skipped,
        "cut_captions": data.truncated_captions,
        "clip": run.clip.name,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    files.write_json(run.workdir / SUMMARY_FILE, summary)
    return summary


def _write_rankings(run: setup.Run, data: Data, evaluation: Evaluation) -> None:
    """Writes a line per readable caption: the rank of its video, and the nearest videos."""
    test = data.packed.splits[run.config.data.eval_split]
    texts = [(test.ids[i], text) for i, texts in enumerate(test.captions) for text in texts]
    lines = [
        {
            "caption": caption,
            "video": video,
            "rank": rank,
            "top": [test.ids[i] for i in top],
            "similarities": [round(float(s), 4) for s in similarities],
        }
        for (video, caption), rank, top, similarities in zip(
            texts, evaluation.ranks.t2v.tolist(), *evaluation.top, strict=True
        )
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_atomic(run.workdir / RANKINGS_FILE, content.encode())


def protocol(kind: str) -> str | None:
    """Which splits of a benchmark are used, in words; None for other datasets."""
    return registry.get(kind).protocol or None


def to_scalars(results: Results, prefix: str = "") -> dict[str, float]:
    """{"t2v/R@1": …}, a line of metrics.jsonl."""
    return {
        f"{prefix}{side}/{name}": value
        for side, values in results.items()
        for name, value in values.items()
    }


def read_evaluations(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics that are evaluations."""
    return [line for line in read_metrics(workdir) if any("t2v/" in key for key in line)]


def logged_results(
    lines: list[dict[str, Any]], step: int, measured_on: str, prefix: str = ""
) -> Results | None:
    """The evaluation of a step that an earlier start of this run logged, if any.

    Args:
        lines: of `read_evaluations`.
        measured_on: the fingerprint of the evaluated split, see `EvalSet`.
    """
    for line in lines:
        if line["step"] != step or not any(key.startswith(f"{prefix}t2v/") for key in line):
            continue
        if line.get(MEASURED_ON, measured_on) != measured_on:  # older lines lack it
            continue
        results: Results = {}
        for key, value in line.items():
            if "/" in key:
                side, name = key.removeprefix(prefix).split("/", 1)
                results.setdefault(side, {})[name] = value
        # A damaged line may still be JSON, with other names.
        names = {frozenset(results.get(side, ())) for side in ("v2t", *_sides(results))}
        if len(names) == 1:
            return results
    return None


def format_results(results: Results) -> str:
    """A table for people: one row a side, one of accuracies."""
    names, sides = list(results["t2v"]), _sides(results)
    width = max(map(len, sides)) + 2
    rows = [" " * width + "".join(f"{name:>8}" for name in names)]
    rows += [
        f"{side:<{width}}" + "".join(f"{results[side][name]:8.1f}" for name in names)
        for side in sides
    ]
    if "accuracy" in results:
        rows.append(" " * width + format_accuracy(results["accuracy"]))
    return "\n".join(rows)


def _sides(values: Mapping[str, Any]) -> list[str]:
    """Of results or a summary, what was ranked: t2v, v2t and their variants."""
    return [key for key in values if key.startswith(("t2v", "v2t"))]


def format_accuracy(accuracy: dict[str, float]) -> str:
    """direction 51.0 %, speed 60.4 % distinguished from its opposite."""
    parts = ", ".join(f"{name} {percent:.1f} %" for name, percent in accuracy.items())
    return f"{parts} distinguished from its opposite"


def format_summary(summary: dict[str, Any], workdir: str) -> str:
    """The before/after table."""
    names, sides = list(summary["t2v"]), _sides(summary)
    width = max(map(len, sides)) + 11
    rows = [
        f"{summary['method']}, {summary['steps']} steps, {summary['trainable_params']:,} trained "
        f"parameters; {summary['num_texts']} captions x {summary['num_videos']} videos"
        f"{by_chance(summary['num_videos'])}",
        " " * width + "".join(f"{name:>8}" for name in names),
    ]
    for side in sides:
        for label, values in (("before", summary["before"]), ("after", summary)):
            if values and side in values:  # an extra row may have been added later
                cells = "".join(f"{values[side][name]:8.1f}" for name in names)
                rows.append(f"{f'{side} {label}':<{width}}{cells}")
    for label, values in (("before", summary["before"]), ("after", summary)):
        if values and "accuracy" in values:
            rows.append(f"{label:<{width}}{format_accuracy(values['accuracy'])}")
    if summary["skipped_videos"]:
        rows.append(f"skipped videos: {len(summary['skipped_videos'])}, see summary.json")
    rows.append(f"results in {workdir}")
    return "\n".join(rows)
