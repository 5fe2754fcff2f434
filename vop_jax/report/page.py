"""Runs become one HTML page that needs nothing else, no network either."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

from vop_jax.errors import UserError
from vop_jax.report import plots
from vop_jax.report.ablations import find_ablations, references
from vop_jax.report.examples import HEIGHT, compare
from vop_jax.report.runs import COLUMNS, Row, Run, best, format_mean, grouped
from vop_jax.tuning.methods import METHODS

try:
    import jinja2
    from markupsafe import Markup
except ImportError:
    raise UserError('a report needs the extra "report": pip install -e ".[report]"') from None


def render(runs: Sequence[Run], pair: Sequence[str] = ()) -> str:
    """The page.

    Args:
        pair: labels of the two rows whose answers are shown side by side; by default plain
            `vop`, else the worst, beside the best.

    Raises:
        UserError: a label of no row.
    """
    rows = sorted(grouped(runs), key=lambda row: list(METHODS).index(row["method"]))
    by_workdir = {run.workdir: run for run in runs}
    configs = {run.workdir: run.config for run in runs}
    winners = best(rows)
    main_rows = list(references(rows, configs).values())
    one, two = _pair(rows, main_rows, pair)
    comparison, why_not = None, "one run has nobody to be compared with"
    if one is not two:
        try:
            comparison = compare(by_workdir[one["workdirs"][0]], by_workdir[two["workdirs"][0]])
        except UserError as error:
            if pair:  # asked for
                raise
            why_not = str(error)
    accuracies = [key for key in ("t2v/R@1", "accuracy/direction") if key in winners]
    found = find_ablations(rows, configs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = importlib.resources.files("vop_jax.report").joinpath("page.html").read_text("utf-8")
    return environment.from_string(source).render(
        title="Text-video retrieval: " + ", ".join(dict.fromkeys(row["method"] for row in rows)),
        subtitle=_sizes(runs),
        headings=[heading for key, heading, _ in COLUMNS if key in winners],
        table=[_cells(row, winners) for row in rows],
        of_each=len(main_rows) < len(rows),
        has_accuracy="accuracy/direction" in winners,
        trade_off=Markup(plots.trade_off(main_rows)),
        ablations=[Markup(plots.ablation(ablation, accuracies)) for ablation in found],
        curves=Markup(plots.learning_curves(main_rows, by_workdir)),
        comparison=comparison,
        why_not=why_not,
        names=(one["label"], two["label"]),
        rendering="pixelated" if _stored_side(runs) < HEIGHT else "auto",
    )


def _pair(rows: Sequence[Row], main: Sequence[Row], labels: Sequence[str]) -> tuple[Row, Row]:
    known = {row["label"]: row for row in rows}
    for label in labels:
        if label not in known:
            raise UserError(f"--compare: no run {label!r}; there are {', '.join(known)}")
    if labels:
        return known[labels[0]], known[labels[1]]
    ordered = sorted(main, key=lambda row: row["metrics"]["t2v/R@1"][0])
    plain = [row for row in main if row["method"] == "vop"]
    return (*plain, ordered[0])[0], ordered[-1]


def _cells(row: Row, winners: Mapping[str, float]) -> dict[str, Any]:
    return {
        "label": row["label"],
        "trainable": f"{row['trainable']:,}",
        "seeds": row["seeds"],
        "cells": [
            {
                "text": format_mean(*row["metrics"][key]),
                "best": row["metrics"][key][0] == winners[key],
            }
            for key, _, _ in COLUMNS
            if key in winners
        ],
    }


def _sizes(runs: Sequence[Run]) -> str:
    """What was ranked: CLIP, split and the size of both sides."""
    kinds = dict.fromkeys(
        f"{s['num_texts']:,} captions x {s['num_videos']:,} videos of split {s['eval_split']}, "
        f"over {s['clip']}"
        for s in (run.summary for run in runs)
    )
    return "; ".join(kinds)


def _stored_side(runs: Sequence[Run]) -> int:
    return int(runs[0].config["data"]["short_side"])
