"""Finished runs become the rows of a table: means over seeds, labels, and ablations."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vop_jax.config import base as configs
from vop_jax.errors import UserError
from vop_jax.storage.files import walk
from vop_jax.training.writer import read_metrics

# Keys of every summary.json and of every line of rankings.jsonl; dict: of numbers.
SUMMARY: dict[str, type] = {"method": str, "clip": str, "eval_split": str, "t2v": dict, "v2t": dict}
SUMMARY |= dict.fromkeys(("steps", "trainable_params", "num_texts", "num_videos"), int)
RANKING: dict[str, type] = {"caption": str, "video": str, "rank": float, "top": list}
REWRITE = "--mode=eval on that workdir writes it"

# (key of a row's metrics, heading, whether more is better)
COLUMNS = (
    ("t2v/R@1", "t2v R@1", True),
    ("t2v/R@5", "R@5", True),
    ("t2v/MnR", "MnR", False),
    ("v2t/R@1", "v2t R@1", True),
    ("v2t/R@5", "R@5", True),
    ("v2t/MnR", "MnR", False),
    ("accuracy/direction", "direction", True),
    ("accuracy/speed", "speed", True),
)
COSTS = (("gflop_per_clip", "GFLOP / clip", ".2f"), ("ms_per_clip", "ms / clip", ".2f"))

# Paths and ways to compute do not make two runs different.
UNLABELLED = ("seed", *configs.RESUMABLE)
TUNED_ALONG = ("train.learning_rate", "train.steps")  # may differ within an ablation

Row = dict[str, Any]
Settings = Mapping[str, Mapping[str, Any]]  # {workdir: `FinishedRun.settings`}


@dataclasses.dataclass(frozen=True)
class EvalData:
    """The data of an evaluation; results on different data are not compared.

    Attributes:
        name: of the dataset; for a folder also the name of its annotations or records.
        texts, videos: number of ranked ones, including missing videos.
        digest: of the captions, each with its video; "" without rankings.jsonl.
    """

    name: str
    split: str
    texts: int
    videos: int
    digest: str

    def __str__(self) -> str:
        sizes = f"{self.texts:,} captions x {self.videos:,} videos"
        return f"{self.name}, {self.split}: {sizes} ({self.digest or 'no rankings.jsonl'})"

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for equal data, whatever the paths and names of its files."""
        place = () if self.digest else (self.name, self.split)
        return (*place, self.texts, self.videos, self.digest)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The files of a finished run.

    Attributes:
        config: config.json, with the defaults of keys that it lacks.
        summary: summary.json.
        metrics: the lines of metrics.jsonl.
    """

    workdir: str
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.summary["method"])

    def settings(self) -> dict[str, Any]:
        """The config keys that may change a result, and "clip"."""
        flat = {k: v for k, v in configs.flatten_config(self.config).items() if k not in UNLABELLED}
        clip = str(self.summary["clip"])  # ARCH from SOURCE (FINGERPRINT)
        return flat | {"clip": clip.rpartition(" (")[0] or clip}

    def rankings(self) -> list[dict[str, Any]]:
        """The lines of rankings.jsonl, one for each caption.

        Raises:
            UserError: the file does not exist, or is damaged.
        """
        path = epath.Path(self.workdir) / configs.RANKINGS_FILE
        if not path.exists():
            raise UserError(f"{path}: no such file; {REWRITE}")
        return [_parse(line, RANKING, path) for line in path.read_bytes().split(b"\n") if line]

    def eval_data(self) -> EvalData:
        """The data of its evaluation."""
        data, summary = self.config["data"], self.summary
        file = os.path.basename((data["annotations"] or data["records"]).rstrip("/"))
        name = f"{data['kind']} {file}" if data["kind"] == "folder" and file else data["kind"]
        digest = ""
        if (epath.Path(self.workdir) / configs.RANKINGS_FILE).exists():
            pairs = sorted((line["video"], line["caption"]) for line in self.rankings())
            digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:8]
        sizes = summary["num_texts"], summary["num_videos"]
        return EvalData(name, summary["eval_split"], *sizes, digest)


def read_run(workdir: str | os.PathLike) -> FinishedRun:
    """Reads the workdir of a finished run.

    Raises:
        UserError: it holds no finished run, or a damaged one.
    """
    path = epath.Path(workdir) / configs.SUMMARY_FILE
    config = configs.workdir_config(workdir)
    if config is None or not path.exists():
        missing = path if config else path.parent / configs.CONFIG_FILE
        raise UserError(f"{missing}: no such file; give the workdir of a finished run")
    summary = _parse(path.read_bytes(), SUMMARY, path)
    return FinishedRun(os.fspath(workdir), config.to_dict(), summary, read_metrics(workdir))


def _parse(text: bytes, kinds: Mapping[str, type], path: epath.Path) -> dict[str, Any]:
    """A JSON object with these keys and kinds of values; UserError names the file."""
    try:
        values = json.loads(text)
        for key, kind in kinds.items():
            if not _is(values[key], kind):
                raise ValueError(f"{key} is {values[key]!r}")
        if not _is(values.get("accuracy", {}), dict):
            raise ValueError(f"accuracy is {values['accuracy']!r}")
        intervals_of(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"[:100]
        raise UserError(f"{path}: damaged ({why}); {REWRITE}") from None
    return dict(values)


def _is(value: Any, kind: type) -> bool:
    if kind is dict:
        return isinstance(value, dict) and all(_is(number, float) for number in value.values())
    return isinstance(value, int | float if kind is float else kind)


def find_runs(folders: Sequence[str]) -> list[FinishedRun]:
    """The finished runs in folders; a folder inside a workdir (pre-training) is no run.

    Raises:
        UserError: a folder without a finished run.
    """
    runs = {}
    for folder in folders:
        workdirs = []
        for path, inside, files in walk(folder, links=False):
            if configs.SUMMARY_FILE in files or (not path and configs.CONFIG_FILE in files):
                workdirs.append(os.path.join(folder, path) if path else folder)
                inside.clear()
        if not workdirs:
            raise UserError(f"{folder}: no finished run (a folder with summary.json) there")
        # A run that is given twice, alone and in a folder, counts once.
        runs.update({os.path.realpath(workdir): read_run(workdir) for workdir in workdirs})
    return list(runs.values())


def by_eval_data(runs: Sequence[FinishedRun]) -> dict[EvalData, list[FinishedRun]]:
    """The runs on each test data, in their order."""
    first: dict[tuple[Any, ...], EvalData] = {}
    groups: dict[EvalData, list[FinishedRun]] = {}
    for run in runs:
        data = run.eval_data()
        groups.setdefault(first.setdefault(data.identity, data), []).append(run)
    return groups


def grouped(runs: Sequence[FinishedRun], labels: Mapping[str, str] | None = None) -> list[Row]:
    """A row for each setting, in the order of the runs; runs that differ in seed share a row.

    Args:
        labels: {workdir: label}; by default those of `label_runs`.

    Returns:
        Rows of "label", "method", "learning_rate", "steps", "seeds", "trainable", "workdirs" and
        "metrics": {"t2v/R@1": (mean, sample standard deviation or None for one seed)}, and of one
        seed "intervals": {"t2v/R@1": (low, high)}.
    """
    labels = labels or label_runs(runs)
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(labels[run.workdir], []).append(run)
    return [_row(label, group) for label, group in groups.items()]


def _row(label: str, group: Sequence[FinishedRun]) -> Row:
    first = group[0]
    scalars = [
        {
            f"{side}/{name}": value
            for side in ("t2v", "v2t", "accuracy")
            for name, value in run.summary.get(side, {}).items()
        }
        for run in group
    ]
    shared = [key for key in scalars[0] if all(key in s for s in scalars)]
    return {
        "label": label,
        "method": first.method,
        "learning_rate": first.config["train"]["learning_rate"],
        "steps": first.summary["steps"],
        "seeds": len(group),
        "trainable": first.summary["trainable_params"],
        "workdirs": [run.workdir for run in group],
        "metrics": {key: mean_std([s[key] for s in scalars]) for key in shared},
        "intervals": intervals_of(first.summary) if len(group) == 1 else {},
    }


def intervals_of(summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """{"t2v/R@1": (low, high)} of a summary; {} of one that an older version wrote."""
    return {
        f"{side}/{name}": (float(low), float(high))
        for side, recalls in summary.get("intervals", {}).items()
        for name, (low, high) in recalls.items()
    }


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def label_runs(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """{workdir: label}: the method, and each setting in which runs of that method differ."""
    settings = {run.workdir: run.settings() for run in runs}
    labels = {}
    for run in runs:
        same_method = [settings[r.workdir] for r in runs if r.method == run.method]
        varied = [
            f"{key.rpartition('.')[2]}={value}"
            for key, value in settings[run.workdir].items()
            if any(other.get(key) != value for other in same_method)
        ]
        labels[run.workdir] = " ".join([run.method, *varied])
    return labels


def best(rows: Sequence[Row]) -> dict[str, float]:
    """{metric: best mean}, of the metrics that all rows have."""
    return {
        key: (max if more else min)(row["metrics"][key][0] for row in rows)
        for key, _, more in COLUMNS
        if rows and all(key in row["metrics"] for row in rows)
    }


def format_mean(mean: float, std: float | None) -> str:
    """49.5, or 49.5 ± 1.2 over seeds."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; the best value of each column is bold."""
    winners = best(rows)
    columns = [column for column in COLUMNS if column[0] in winners]
    costs = [cost for cost in COSTS if rows and all(cost[0] in row for row in rows)]
    headings = ["method", "trained", *(heading for _, heading, _ in (*columns, *costs))]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in rows:
        cells = [row["label"], f"{row['trainable']:,}"]
        for key, _, _ in columns:
            cell = format_mean(*row["metrics"][key])
            cells.append(f"**{cell}**" if row["metrics"][key][0] == winners[key] else cell)
        lines.append(cells + [format(row[key], spec) for key, _, spec in costs])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Rows of one method that differ in one setting, or in several that vary together.

    Attributes:
        keys: the settings, such as ("method.split_layer",).
        points: (values of the settings, row), sorted by value; one is `reference`.
        reference: the values of the method's reference row, see `reference_rows`.
    """

    method: str
    keys: tuple[str, ...]
    points: list[tuple[tuple[Any, ...], Row]]
    reference: tuple[Any, ...]


def reference_rows(rows: Sequence[Row], settings: Settings) -> dict[str, Row]:
    """{method: its row with the most common settings}; among equals the one with the best R@1."""
    chosen = {}
    for method, members in _by_method(rows).items():
        own = [
            [(k, str(v)) for k, v in settings[row["workdirs"][0]].items() if k not in TUNED_ALONG]
            for row in members
        ]
        votes = collections.Counter(itertools.chain(*own))
        scores = [
            (sum(votes[setting] for setting in each), row["metrics"]["t2v/R@1"][0])
            for each, row in zip(own, members, strict=True)
        ]
        chosen[method] = members[scores.index(max(scores))]
    return chosen


def find_ablations(rows: Sequence[Row], settings: Settings) -> list[Ablation]:
    """Rows that differ from their method's reference in the same settings are one ablation."""
    ablations = []
    for method, reference in reference_rows(rows, settings).items():
        base = settings[reference["workdirs"][0]]
        varied: dict[tuple[str, ...], list[Row]] = {}
        for row in _by_method(rows)[method]:
            own = settings[row["workdirs"][0]]
            differing = [key for key in base if str(own.get(key)) != str(base[key])]
            keys = tuple(key for key in differing if key not in TUNED_ALONG) or tuple(differing)
            if keys:
                varied.setdefault(keys, []).append(row)
        for keys, members in varied.items():
            points = [
                (tuple(settings[row["workdirs"][0]].get(key) for key in keys), row)
                for row in [reference, *members]
            ]
            points.sort(key=lambda point: _sort_key(point[0]))
            ablations.append(Ablation(method, keys, points, tuple(base[key] for key in keys)))
    return ablations


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def _sort_key(values: tuple[Any, ...]) -> tuple[Any, ...]:
    numbers = all(isinstance(value, int | float) for value in values)
    return (0, *values) if numbers else (1, *map(str, values))
