"""The paper's results next to those of finished runs: the tables of docs/benchmarks/paper.md."""

import importlib.resources
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from vop_jax.config.base import RESUMABLE, base_config, flatten_config
from vop_jax.data.datasets import registry
from vop_jax.errors import UserError
from vop_jax.report.runs import UNLABELLED, FinishedRun, Row, format_mean, grouped
from vop_jax.tuning.methods import METHODS

PAPER_CLIP, PAPER_FRAMES = "ViT-B/32", 12  # of all results in the paper

# {benchmark: (captions, videos) of the official test split}, None if its lists differ; results on
# other sizes are not comparable.
TEST_SIZES = {
    source.kind: (test.captions, test.videos) if test.captions and test.videos else None
    for source in map(registry.get, registry.kinds())
    if (test := source.sizes.get("test"))
}

MAIN = "msrvtt9k"  # for other datasets the paper prints only the difference of R@1 to `full`

# (key of a row's metrics, heading)
FIGURES = (
    ("t2v/R@1", "t2v R@1"),
    ("t2v/R@5", "R@5"),
    ("t2v/R@10", "R@10"),
    ("t2v/MnR", "MnR"),
    ("v2t/R@1", "v2t R@1"),
)
SETTINGS = ("learning rate", "steps", "seeds", "frames")
# Config keys that notes leave out: columns show them, benchmarks set them, or nothing depends on
# them.
NOT_NOTED = (
    *(*RESUMABLE, *UNLABELLED, "method.name", "train.learning_rate", "train.steps"),
    *("data.kind", "data.frames", "data.flip"),
)
UNMEASURED = "not measured here"
NO_FIGURE = "–"
END = "<!-- end -->"


def load_paper() -> dict[str, Any]:
    """The paper's results: those that it "printed", and those "derived" from them."""
    path = importlib.resources.files("vop_jax.report").joinpath("paper.json")
    return json.loads(path.read_text("utf-8"))


def fill(path: str | os.PathLike, runs: Sequence[FinishedRun]) -> bytes:
    """The content of a document with new tables between its markers.

    Args:
        path: it has `<!-- table: NAME -->` and `<!-- end -->` once for each benchmark.
        runs: those on other data than the benchmarks are ignored.

    Raises:
        UserError: a marker is missing or repeated, or the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    try:
        text = epath.Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    for name in TEST_SIZES:
        start = f"<!-- table: {name} -->"
        before, marker, rest = text.partition(start)
        if not marker:
            raise UserError(f"{path}: no marker {start}")
        old, end, after = rest.partition(END)
        if not end or "<!-- table:" in old:
            raise UserError(f"{path}: no {END} after {start}")
        if start in after:
            raise UserError(f"{path}: marker {start} is there twice")
        text = f"{before}{start}\n\n{table(name, runs)}\n{END}{after}"
    return text.encode()


def notes(runs: Iterable[FinishedRun]) -> Iterator[tuple[str, str]]:
    """(workdir, what `fill` does with the run)."""
    for run in runs:
        kind = run.config["data"]["kind"]
        if kind not in TEST_SIZES:
            yield run.workdir, f"data.kind={kind}, in no table"
        elif why := why_not(run):
            yield run.workdir, f"listed, not filled in: {why}"
        else:
            yield run.workdir, "filled in"


def table(name: str, runs: Iterable[FinishedRun]) -> str:
    """A benchmark's table in Markdown, with notes on its runs below.

    The row of a method has the paper's results, and those of runs with the paper's CLIP and
    number of frames; other runs have rows of their own. No result decides what is shown.

    Args:
        runs: those on other data are ignored.
    """
    own = [run for run in runs if run.config["data"]["kind"] == name]
    reasons = {run.workdir: why_not(run) for run in own}
    paper = paper_cells(name)
    headings = ["method", *paper["method"]]
    headings += [f"ours: {FIGURES[0][1]}", *(heading for _, heading in FIGURES[1:]), *SETTINGS]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    rows = _measured_rows([run for run in own if not reasons[run.workdir]])
    for method in METHODS:
        as_paper, others = rows.get((method, True), []), rows.get((method, False), [])
        lines += [[label, *paper[method], *cells] for label, cells in as_paper]
        if not as_paper:
            blank = [""] * (len(FIGURES) + len(SETTINGS) - 1)
            lines.append([method, *paper[method], UNMEASURED, *blank])
        no_figures = [NO_FIGURE] * len(paper["method"])
        lines += [[label, *no_figures, *cells] for label, cells in others]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    below = [_note(run, reasons[run.workdir]) for run in own]
    return text + "".join(f"\n- {note}" for note in below) + "\n" * bool(below)


def why_not(run: FinishedRun) -> str:
    """Why a run on a benchmark is not comparable with the paper's table; "" if it is."""
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
    chosen = config["train"].get("select") == "best"  # the result may be an earlier checkpoint
    if summary["trainable_params"] and summary["steps"] < steps and not chosen:
        return f"evaluated after {summary['steps']:,} of {steps:,} steps"
    return ""


def _sizes(texts: int, videos: int) -> str:
    return f"{texts:,} captions x {videos:,} videos"


def paper_cells(name: str) -> dict[str, list[str]]:
    """{method: the paper's cells of its row}, and "method": their headings.

    The cells are the printed results for MSR-VTT-9k; for the paper's other datasets the printed
    difference to `full` and the R@1 derived from it; for datasets outside the paper there are none.
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


def _measured_rows(
    runs: Sequence[FinishedRun],
) -> dict[tuple[str, bool], list[tuple[str, list[str]]]]:
    """{(method, whether CLIP and frames are the paper's): (label, cells) of each row}."""
    clips = {run.summary["clip"] for run in runs}
    by_setting: dict[tuple[int, str], list[FinishedRun]] = {}
    for run in runs:
        key = run.config["data"]["frames"], run.summary["clip"]
        by_setting.setdefault(key, []).append(run)
    rows: dict[tuple[str, bool], list[tuple[str, list[str]]]] = {}
    for (frames, clip), group in by_setting.items():
        usual_clip = clip.partition(" from ")[0] == PAPER_CLIP
        suffix = "" if frames == PAPER_FRAMES else f", {frames} frames"
        if not usual_clip or len(clips) > 1:
            suffix += f", {clip}"
        as_paper = usual_clip and frames == PAPER_FRAMES
        for row in grouped(group):
            entry = row["label"] + suffix, _cells(row, frames)
            rows.setdefault((row["method"], as_paper), []).append(entry)
    return rows


def _cells(row: Row, frames: int) -> list[str]:
    figures = [format_mean(*row["metrics"][key]) for key, _ in FIGURES]
    rate = f"{row['learning_rate']:g}" if row["trainable"] else NO_FIGURE
    return [*figures, rate, f"{row['steps']:,}", str(row["seeds"]), str(frames)]


def _note(run: FinishedRun, reason: str) -> str:
    """A line on a run: why it is not in the table, or its data, CLIP and changed config keys."""
    summary = run.summary
    if reason:
        return f"`{run.workdir}`, {summary['method']}: not in the table, {reason}"
    usual = flatten_config(base_config())
    changed = [
        f"{key}={value}"
        for key, value in flatten_config(run.config).items()
        if key not in NOT_NOTED and key in usual and value != usual[key]
    ]
    parts = [_sizes(summary["num_texts"], summary["num_videos"]), summary["clip"], *changed]
    unread = [v for v in summary["skipped_videos"] if v["split"] == summary["eval_split"]]
    if unread:
        parts.append(f"{len(unread)} unreadable videos ({summary['missing_videos_count_as']})")
    return f"`{run.workdir}`: {'; '.join(parts)}"
