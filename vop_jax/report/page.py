"""Renders runs as one HTML page that loads nothing from elsewhere."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from vop_jax.errors import UserError
from vop_jax.report import plots
from vop_jax.report.examples import HEIGHT, compare, failures
from vop_jax.report.runs import (
    COLUMNS,
    EvalData,
    FinishedRun,
    Row,
    best,
    by_eval_data,
    find_ablations,
    format_mean,
    grouped,
    reference_rows,
)
from vop_jax.tuning.methods import METHODS


def render(runs: Sequence[FinishedRun], pair: Sequence[str] = (), worst: int = 6) -> str:
    """The page: for each test data a section with a table, plots and queries.

    Args:
        pair: labels of the two rows whose rankings are compared; by default the best row and
            plain `vop`, or else the worst.
        worst: how many failures of each section's best run are shown.

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
    sections = [_section(data, rows, by_workdir, pair, worst) for data, rows in tables.items()]
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
            raise UserError(f"--compare: no run {label!r}; allowed are {', '.join(known)}")
    if pair and not any(set(pair) <= own for own in labels):
        raise UserError(
            f"--compare: {' and '.join(pair)} are in different tables: their test data differ, or "
            "one has no rankings.jsonl, which --mode=eval on its workdir writes"
        )


def _section(
    data: EvalData,
    rows: Sequence[Row],
    runs: Mapping[str, FinishedRun],
    pair: Sequence[str],
    worst: int,
) -> dict[str, Any]:
    """The values of the template for the runs on one test data."""
    own = [runs[workdir] for row in rows for workdir in row["workdirs"]]
    settings = {run.workdir: run.settings() for run in own}
    winners = best(rows)
    shown = [column for column in COLUMNS if column[0] in winners]
    main_rows = list(reference_rows(rows, settings).values())
    accuracies = [key for key in ("t2v/R@1", "accuracy/direction") if key in winners]
    ablations = find_ablations(rows, settings)

    def cells(row: Row) -> list[dict[str, Any]]:
        means = {key: row["metrics"][key] for key, _, _ in shown}
        return [
            {
                "text": format_mean(*mean),
                "interval": row["intervals"].get(key),
                "best": len(rows) > 1 and mean[0] == winners[key],
            }
            for key, mean in means.items()
        ]

    return {
        "data": str(data),
        "clips": "; ".join(dict.fromkeys(str(run.summary["clip"]) for run in own)),
        "headings": [heading for _, heading, _ in shown],
        "table": [row | {"cells": cells(row)} for row in rows],
        "main_labels": [r["label"] for r in main_rows] if len(main_rows) < len(rows) else [],
        "has_accuracy": "accuracy/direction" in winners,
        "trade_off": Markup(plots.trade_off(main_rows)),
        "ablations": [Markup(plots.ablation(each, accuracies)) for each in ablations],
        "curves": Markup(plots.learning_curves(main_rows, runs)),
        **_queries(rows, main_rows, runs, pair),
        **_failures(main_rows, runs, worst),
    }


def _queries(
    rows: Sequence[Row],
    main: Sequence[Row],
    runs: Mapping[str, FinishedRun],
    labels: Sequence[str],
) -> dict[str, Any]:
    """The comparison of two rows on the same queries, or the reason why it is missing."""
    known = {row["label"]: row for row in rows}
    requested = bool(labels) and set(labels) <= known.keys()
    if requested:
        one, two = known[labels[0]], known[labels[1]]
    else:
        ordered = sorted(main, key=lambda row: row["metrics"]["t2v/R@1"][0])
        one = next((row for row in main if row["method"] == "vop"), ordered[0])
        two = ordered[-1]
    first, second = (runs[row["workdirs"][0]] for row in (one, two))
    comparison, why_not = None, "a comparison needs two rows"
    if one is not two:
        try:
            comparison = compare(first, second)
        except UserError as error:
            if requested:
                raise
            why_not = str(error)
    return {
        "comparison": comparison,
        "why_not": why_not,
        "names": (one["label"], two["label"]),
        "rendering": "pixelated" if int(first.config["data"]["short_side"]) < HEIGHT else "auto",
    }


def _failures(main: Sequence[Row], runs: Mapping[str, FinishedRun], count: int) -> dict[str, Any]:
    """The worst queries of the best row, or the reason why they are missing."""
    best_row = max(main, key=lambda row: row["metrics"]["t2v/R@1"][0])
    run = runs[best_row["workdirs"][0]]
    values = {"worst": count, "failing": f"{best_row['label']} ({run.workdir})"}
    try:
        return values | {"failures": failures(run, count), "no_failures": "every query is right"}
    except UserError as error:
        return values | {"failures": [], "no_failures": str(error)}
