"""Plots of runs as SVG text for the page."""

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vop_jax.report.runs import COLUMNS, Ablation, FinishedRun, Row

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vop_jax",  # equal figures are equal bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
METRICS = {key: heading for key, heading, _ in COLUMNS} | {
    "t2v/R@1": "text to video, R@1",
    "accuracy/direction": "direction accuracy",
}


def trade_off(rows: Sequence[Row]) -> str:
    """R@1 over the number of trained parameters: the paper's figure 1.

    Args:
        rows: one for each method, whose names label the points.
    """
    figure, axes = _figure(7.5, 4.6)
    points = []
    for row, colour in zip(rows, _colours(), strict=False):
        mean, std = row["metrics"]["t2v/R@1"]
        if not row["trainable"]:  # zero has no place on a logarithmic axis
            axes.axhline(mean, color=colour, ls="--", lw=1, label=f"{row['method']}, none trained")
            continue
        axes.errorbar(row["trainable"], mean, yerr=std, fmt="o", color=colour, capsize=3)
        points.append(((row["trainable"], mean), row["method"]))
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.1)
    axes.set_xlabel("trained parameters")
    if len(points) < len(rows):
        axes.legend(fontsize=9, loc="lower right")
    axes.set_ylabel(METRICS["t2v/R@1"])
    figure.draw_without_rendering()  # sets the positions of the points
    # Labels of neighbouring points move down until they no longer overlap.
    placed: list[tuple[float, float]] = []
    for at, label in sorted(points, key=lambda point: -point[0][1]):
        x, y = axes.transData.transform(at)
        height = y
        for left, above in placed:
            if abs(left - x) < 110 and height > above - 14:
                height = min(height, above - 14)
        placed.append((x, height))
        offset = (7, (height - y) * 72 / figure.dpi - 3)
        axes.annotate(label, at, textcoords="offset points", xytext=offset, fontsize=9)
    return _svg(figure)


def ablation(study: Ablation, metrics: Sequence[str]) -> str:
    """Metrics over the values of one setting; a dotted line marks the reference value."""
    figure, axes = _figure(4.6, 3.0)
    names = [_wrapped("/".join(map(str, values)), 14) for values, _ in study.points]
    at = range(len(names))
    for metric, colour in zip(metrics, _colours(), strict=False):
        means = [row["metrics"][metric][0] for _, row in study.points]
        stds = [row["metrics"][metric][1] or 0 for _, row in study.points]
        axes.errorbar(
            at, means, yerr=stds, marker="o", color=colour, capsize=3, label=METRICS[metric]
        )
    axes.set_xticks(at, names)
    axes.axvline([v for v, _ in study.points].index(study.reference), color="0.6", ls=":", lw=1)
    axes.set_xlabel(_wrapped(", ".join(key.rpartition(".")[2] for key in study.keys), 48))
    axes.set_title(study.method, fontsize=10)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    return _svg(figure)


def learning_curves(rows: Sequence[Row], runs: Mapping[str, FinishedRun]) -> str:
    """The loss of each row's first seed and, if training evaluated it, t2v R@1.

    Args:
        rows: one for each method, whose names label the curves.
        runs: {workdir: run}.
    """
    curves = {row["method"]: runs[row["workdirs"][0]].metrics for row in rows}
    evaluated = any(len(_points(lines, "t2v/R@1")) > 2 for lines in curves.values())
    figure, *axes = _figure(10 if evaluated else 8, 3.6, columns=2 if evaluated else 1)
    for ax, key in zip(axes, ("loss", "t2v/R@1"), strict=False):
        for (method, lines), colour in zip(curves.items(), _colours(), strict=False):
            if points := _points(lines, key):
                ax.plot(*zip(*points, strict=True), color=colour, label=method, lw=1.4)
        ax.set_xlabel("step")
        ax.set_ylabel(METRICS.get(key, key))
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return _svg(figure)


def _wrapped(text: str, width: int) -> str:
    """At most four lines, in which `$` starts no formula."""
    lines = textwrap.wrap(text.replace("$", r"\$"), width, max_lines=4, placeholder=" …")
    return "\n".join(lines)


def _points(lines: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _colours() -> itertools.cycle:
    palette = matplotlib.colormaps["tab20"]  # ten strong colours, each before its pale one
    return itertools.cycle(palette(i) for i in (*range(0, 20, 2), *range(1, 20, 2)))


def _figure(width: float, height: float, columns: int = 1) -> tuple:
    """(figure, axes…), inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)
    return figure, *axes[0]


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
