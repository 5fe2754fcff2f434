"""Runs become one HTML page that needs nothing else, no network either."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

from vop_jax.errors import UserError
from vop_jax.report import plots
from vop_jax.report.ablations import find_ablations, references
from vop_jax.report.examples import HEIGHT, compare
from vop_jax.report.runs import (
    COLUMNS,
    EvalData,
    Row,
    Run,
    best,
    by_eval_data,
    format_mean,
    grouped,
)
from vop_jax.tuning.methods import METHODS

try:
    import jinja2
    from markupsafe import Markup
except ImportError:
    raise UserError('a report needs the extra "report": pip install -e ".[report]"') from None


def render(runs: Sequence[Run], pair: Sequence[str] = ()) -> str:
    """The page: a section for each test data, with a table, plots and queries of its own.

    Args:
        pair: labels of the two rows whose answers are shown side by side; by default plain
            `vop`, else the worst, beside the best.

    Raises:
        UserError: a label of no row, or labels of rows on different data.
    """
    order = list(METHODS)
    tables = {
        data: sorted(grouped(group), key=lambda row: order.index(row["method"]))
        for data, group in by_eval_data(runs).items()
    }
    _check_pair(tables, pair)
    by_workdir = {run.workdir: run for run in runs}
    sections = [_section(data, rows, by_workdir, pair) for data, rows in tables.items()]
    methods = dict.fromkeys(row["method"] for rows in tables.values() for row in rows)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = importlib.resources.files("vop_jax.report").joinpath("page.html").read_text("utf-8")
    return environment.from_string(source).render(
        title="Text-video retrieval: " + ", ".join(methods), sections=sections
    )


def _check_pair(tables: Mapping[EvalData, Sequence[Row]], pair: Sequence[str]) -> None:
    labels = [{row["label"] for row in rows} for rows in tables.values()]
    known = sorted(set().union(*labels))
    for label in pair:
        if label not in known:
            raise UserError(f"--compare: no run {label!r}; there are {', '.join(known)}")
    if pair and not any(set(pair) <= own for own in labels):
        raise UserError(
            f"--compare: {' and '.join(pair)} are in different tables: their test data differ, or "
            "one has no rankings.jsonl, which --mode=eval on its workdir writes"
        )


def _section(
    data: EvalData, rows: Sequence[Row], runs: Mapping[str, Run], pair: Sequence[str]
) -> dict[str, Any]:
    """What the template shows of the runs on one test data."""
    own = [runs[workdir] for row in rows for workdir in row["workdirs"]]
    settings = {run.workdir: run.settings() for run in own}
    winners = best(rows)
    main_rows = list(references(rows, settings).values())
    accuracies = [key for key in ("t2v/R@1", "accuracy/direction") if key in winners]
    found = find_ablations(rows, settings)
    return {
        "data": str(data),
        "clips": "; ".join(dict.fromkeys(str(run.summary["clip"]) for run in own)),
        "headings": [heading for key, heading, _ in COLUMNS if key in winners],
        "table": [_cells(row, winners, alone=len(rows) == 1) for row in rows],
        "of_each": [row["label"] for row in main_rows] if len(main_rows) < len(rows) else [],
        "has_accuracy": "accuracy/direction" in winners,
        "trade_off": Markup(plots.trade_off(main_rows)),
        "ablations": [Markup(plots.ablation(ablation, accuracies)) for ablation in found],
        "curves": Markup(plots.learning_curves(main_rows, runs)),
        **_queries(rows, main_rows, runs, pair),
    }


def _queries(
    rows: Sequence[Row], main: Sequence[Row], runs: Mapping[str, Run], labels: Sequence[str]
) -> dict[str, Any]:
    """Two rows' answers to the same queries, or why there are none."""
    one, two = _pair(rows, main, labels)
    comparison, why_not = None, "one run has nobody to be compared with"
    if one is not two:
        first, second = (runs[row["workdirs"][0]] for row in (one, two))
        try:
            comparison = compare(first, second)
        except UserError as error:
            if {one["label"], two["label"]} == set(labels):  # asked for
                raise
            why_not = str(error)
    side = int(runs[one["workdirs"][0]].config["data"]["short_side"])
    return {
        "comparison": comparison,
        "why_not": why_not,
        "names": (one["label"], two["label"]),
        "rendering": "pixelated" if side < HEIGHT else "auto",
    }


def _pair(rows: Sequence[Row], main: Sequence[Row], labels: Sequence[str]) -> tuple[Row, Row]:
    known = {row["label"]: row for row in rows}
    if labels and set(labels) <= known.keys():
        return known[labels[0]], known[labels[1]]
    ordered = sorted(main, key=lambda row: row["metrics"]["t2v/R@1"][0])
    plain = [row for row in main if row["method"] == "vop"]
    return (*plain, ordered[0])[0], ordered[-1]


def _cells(row: Row, winners: Mapping[str, float], *, alone: bool) -> dict[str, Any]:
    return {
        "label": row["label"],
        "trainable": f"{row['trainable']:,}",
        "seeds": row["seeds"],
        "cells": [
            {
                "text": format_mean(*row["metrics"][key]),
                "best": not alone and row["metrics"][key][0] == winners[key],
            }
            for key, _, _ in COLUMNS
            if key in winners
        ],
    }
