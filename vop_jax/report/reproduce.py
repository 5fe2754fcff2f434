"""The paper's figures beside those of finished runs: the tables of docs/benchmarks/paper.md."""

import importlib.resources
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from vop_jax.config.base import RESUMABLE, base_config, flatten_config
from vop_jax.data.datasets import registry
from vop_jax.errors import UserError
from vop_jax.report.runs import UNTOLD, Row, Run, format_mean, grouped
from vop_jax.tuning.methods import METHODS

# What the paper's figures were measured with.
PAPER_CLIP, PAPER_FRAMES = "ViT-B/32", 12

# (captions, videos) of the official test splits, None where lists differ; a figure over other
# sizes compares to nothing.
TEST_SIZES = {
    source.kind: (test.captions, test.videos) if test.captions and test.videos else None
    for source in map(registry.get, registry.kinds())
    if (test := source.sizes.get("test"))
}

MAIN = "msrvtt9k"  # of the other datasets the paper prints no more than R@1 less that of `full`

# (key of a row's metrics, heading)
FIGURES = (
    ("t2v/R@1", "t2v R@1"),
    ("t2v/R@5", "R@5"),
    ("t2v/R@10", "R@10"),
    ("t2v/MnR", "MnR"),
    ("v2t/R@1", "v2t R@1"),
)
SETTINGS = ("learning rate", "steps", "seeds", "frames")
# Of a run's config, what the table tells, what a benchmark sets and what changes no figure.
TOLD = (
    *(*RESUMABLE, *UNTOLD, "method.name", "train.learning_rate", "train.steps"),
    *("data.kind", "data.frames", "data.flip"),
)
UNMEASURED = "not measured here"
NO_FIGURE = "–"
END = "<!-- end -->"


def load_paper() -> dict[str, Any]:
    """The paper's figures: what it "printed", and what is "derived" from that."""
    path = importlib.resources.files("vop_jax.report").joinpath("paper.json")
    return json.loads(path.read_text("utf-8"))


def filled(path: str | os.PathLike, runs: Sequence[Run]) -> bytes:
    """A document with the tables between its markers made anew; all else stays as it is.

    Args:
        path: it has `<!-- table: NAME -->` and `<!-- end -->` once for each benchmark.
        runs: those of other data than the benchmarks' are ignored.

    Raises:
        UserError: a marker is missing or there twice, or the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    try:
        text = epath.Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    for name in TEST_SIZES:
        text = _with_table(path, text, name, table(name, runs))
    return text.encode()


def of_benchmarks(runs: Iterable[Run]) -> list[Run]:
    """The runs that belong to a benchmark, in a table or listed below it."""
    return [run for run in runs if run.config["data"]["kind"] in TEST_SIZES]


def of_other_data(runs: Iterable[Run]) -> list[Run]:
    """The runs that belong to no benchmark."""
    return [run for run in runs if run.config["data"]["kind"] not in TEST_SIZES]


def _with_table(path: str | os.PathLike, text: str, name: str, content: str) -> str:
    start = f"<!-- table: {name} -->"
    before, found, rest = text.partition(start)
    if not found:
        raise UserError(f"{path}: no marker {start}")
    old, end, after = rest.partition(END)
    if not end or "<!-- table:" in old:
        raise UserError(f"{path}: no {END} after {start}")
    if start in after:
        raise UserError(f"{path}: marker {start} is there twice")
    return f"{before}{start}\n\n{content}\n{END}{after}"


def table(name: str, runs: Iterable[Run]) -> str:
    """A benchmark's table in Markdown, and under it which runs are not in it and why.

    The row of a method has the paper's figures, and those of runs with the paper's CLIP and
    number of frames; other runs have rows of their own. Nothing is chosen by its result.

    Args:
        runs: of any data; those of this benchmark are taken.
    """
    own = [run for run in runs if run.config["data"]["kind"] == name]
    reasons = {run.workdir: why_not(run) for run in own}
    measured = [run for run in own if not reasons[run.workdir]]
    paper = paper_cells(name)
    headings = ["method", *paper["method"]]
    headings += [f"ours: {FIGURES[0][1]}", *(heading for _, heading in FIGURES[1:]), *SETTINGS]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    rows = _rows(measured)
    for method in METHODS:
        as_paper, others = rows.get((method, True), []), rows.get((method, False), [])
        lines += [[label, *paper[method], *cells] for label, cells in as_paper]
        if not as_paper:
            blank = [""] * (len(FIGURES) + len(SETTINGS) - 1)
            lines.append([method, *paper[method], UNMEASURED, *blank])
        no_figures = [NO_FIGURE] * len(paper["method"])
        lines += [[label, *no_figures, *cells] for label, cells in others]
    notes = [_told(run, reasons[run.workdir]) for run in own]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n- {note}" for note in notes) + "\n" * bool(notes)


def why_not(run: Run) -> str:
    """Why a run of a benchmark says nothing of the paper's table; "" if it does."""
    summary, config = run.summary, run.config
    if summary["eval_split"] != "test":
        return f"split {summary['eval_split']}, not test"
    official = TEST_SIZES[config["data"]["kind"]]
    ranked = summary["num_texts"], summary["num_videos"]
    if official and ranked != official:
        return f"{_sizes(*ranked)}; the official test split has {_sizes(*official)}"
    usual = base_config().method
    for key, value in config["method"].items():
        if key != "name" and value != usual.get(key):
            return f"method.{key}={value} is a variant of it"
    steps = config["train"]["steps"]
    chosen = config["train"].get("select") == "best"  # an earlier checkpoint is the result then
    if summary["trainable_params"] and summary["steps"] < steps and not chosen:
        return f"evaluated after {summary['steps']:,} of {steps:,} steps"
    return ""


def _sizes(texts: int, videos: int) -> str:
    return f"{texts:,} captions x {videos:,} videos"


def paper_cells(name: str) -> dict[str, list[str]]:
    """{method: the paper's cells of its row}, and "method": their headings.

    Of MSR-VTT-9k, what is printed; of the paper's other datasets, the printed difference to
    `full` and, derived, R@1; of datasets that are not the paper's, nothing.
    """
    paper = load_paper()
    relative = paper["printed"]["t2v_r1_minus_full"].get(name)
    if name == MAIN:
        headings = ["paper: trained", *(heading for _, heading in FIGURES)]
        columns, rows = paper["printed"][MAIN]["columns"], paper["printed"][MAIN]["rows"]
        cells = {method: _printed(row, columns) for method, row in rows.items()}
    elif relative:
        headings = ["paper: R@1 less `full`'s, printed", "R@1, derived"]
        full = paper["derived"]["full_t2v_r1"][name]
        cells = {m: [f"{less:+.1f}", f"{full + less:.1f}"] for m, less in relative.items()}
    else:
        headings, cells = [], {}
    return {"method": headings, **{m: cells.get(m, [NO_FIGURE] * len(headings)) for m in METHODS}}


def _printed(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    cells = [f"{row['params_M']} M, {row['percent']:.3f} %" if "percent" in row else NO_FIGURE]
    for key, _ in FIGURES:
        side, name = key.split("/")
        cells.append(f"{row[side][columns.index(name)]:.1f}" if side in row else NO_FIGURE)
    return cells


def _rows(runs: Sequence[Run]) -> dict[tuple[str, bool], list[tuple[str, list[str]]]]:
    """{(method, whether CLIP and frames are the paper's): (label, cells) of each row}."""
    clips = {run.summary["clip"] for run in runs}
    by_setting: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        key = run.config["data"]["frames"], run.summary["clip"]
        by_setting.setdefault(key, []).append(run)
    found: dict[tuple[str, bool], list[tuple[str, list[str]]]] = {}
    for (frames, clip), group in by_setting.items():
        usual_clip = clip.partition(" from ")[0] == PAPER_CLIP
        suffix = "" if frames == PAPER_FRAMES else f", {frames} frames"
        if not usual_clip or len(clips) > 1:
            suffix += f", {clip}"
        as_paper = usual_clip and frames == PAPER_FRAMES
        for row in grouped(group):
            entry = row["label"] + suffix, _cells(row, frames)
            found.setdefault((row["method"], as_paper), []).append(entry)
    return found


def _cells(row: Row, frames: int) -> list[str]:
    figures = [format_mean(*row["metrics"][key]) for key, _ in FIGURES]
    rate = f"{row['learning_rate']:g}" if row["trainable"] else NO_FIGURE
    return [*figures, rate, f"{row['steps']:,}", str(row["seeds"]), str(frames)]


def _told(run: Run, reason: str) -> str:
    """A line on a run: why it is not in the table, or what its figures are of."""
    summary = run.summary
    if reason:
        return f"`{run.workdir}`, {summary['method']}: not in the table, {reason}"
    told = [_sizes(summary["num_texts"], summary["num_videos"]), summary["clip"], *_unusual(run)]
    unread = [v for v in summary["skipped_videos"] if v["split"] == summary["eval_split"]]
    if unread:
        told.append(f"{len(unread)} unreadable videos ({summary['missing_videos_count_as']})")
    return f"`{run.workdir}`: {'; '.join(told)}"


def _unusual(run: Run) -> list[str]:
    """What a run changed of the recipe, such as "compute.dtype=bfloat16"."""
    usual = flatten_config(base_config())
    return [
        f"{key}={value}"
        for key, value in flatten_config(run.config).items()
        if key not in TOLD and key in usual and value != usual[key]
    ]
