"""Run folders become rows: what was varied, and the mean over seeds of what came out."""

import dataclasses
import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vop_jax.config.base import CONFIG_FILE, RESUMABLE, flatten_config, workdir_config
from vop_jax.errors import UserError
from vop_jax.storage.files import walk
from vop_jax.training.writer import read_metrics

# What every summary and every line of rankings.jsonl holds; dict: of numbers.
SUMMARY: dict[str, type] = {"method": str, "clip": str, "eval_split": str, "t2v": dict, "v2t": dict}
SUMMARY |= dict.fromkeys(("steps", "trainable_params", "num_texts", "num_videos"), int)
RANKING: dict[str, type] = {"caption": str, "video": str, "rank": float, "top": list}
ANEW = "--mode=eval on that workdir writes it"

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

# Where things lie and how they are computed do not make two runs different.
UNTOLD = ("seed", *RESUMABLE)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvalData:
    """What a run was evaluated on; figures on different data are not compared.

    Attributes:
        name: of the dataset; for a folder also that of its annotations or records.
        texts, videos: how many were ranked, misses included.
        digest: of the captions that were read, each with its video; "" without rankings.jsonl.
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
        """Equal for the same data, wherever it lies and whatever its files are called."""
        where = () if self.digest else (self.name, self.split)
        return (*where, self.texts, self.videos, self.digest)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run's files.

    Attributes:
        config, summary: config.json, completed, and summary.json.
        metrics: the lines of metrics.jsonl.
    """

    workdir: str
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    def scalars(self) -> dict[str, float]:
        """{"t2v/R@1": …} after training."""
        return {
            f"{side}/{name}": value
            for side in ("t2v", "v2t", "accuracy")
            for name, value in self.summary.get(side, {}).items()
        }

    def settings(self) -> dict[str, Any]:
        """What may make its figures another's: the config's keys, and "clip"."""
        flat = {k: v for k, v in flatten_config(self.config).items() if k not in UNTOLD}
        clip = str(self.summary["clip"])  # ARCH from SOURCE (FINGERPRINT)
        return flat | {"clip": clip.rpartition(" (")[0] or clip}

    def rankings(self) -> list[dict[str, Any]]:
        """The lines of rankings.jsonl, one a caption.

        Raises:
            UserError: it is not there, or cannot be read.
        """
        path = epath.Path(self.workdir) / "rankings.jsonl"
        if not path.exists():
            raise UserError(f"{path}: not there; {ANEW}")
        return [_parsed(line, RANKING, path) for line in path.read_bytes().split(b"\n") if line]

    def eval_data(self) -> EvalData:
        """What it was evaluated on."""
        data, summary = self.config["data"], self.summary
        file = os.path.basename((data["annotations"] or data["records"]).rstrip("/"))
        name = f"{data['kind']} {file}" if data["kind"] == "folder" and file else data["kind"]
        digest = ""
        if (epath.Path(self.workdir) / "rankings.jsonl").exists():
            pairs = sorted((line["video"], line["caption"]) for line in self.rankings())
            digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:8]
        sizes = summary["num_texts"], summary["num_videos"]
        return EvalData(name, summary["eval_split"], *sizes, digest)


def read_run(workdir: str | os.PathLike) -> Run:
    """Opens a run's folder.

    Raises:
        UserError: it holds no finished run.
    """
    path = epath.Path(workdir) / "summary.json"
    config = workdir_config(workdir)
    if config is None or not path.exists():
        missing = path if config else path.parent / CONFIG_FILE
        raise UserError(f"{missing}: not there; give the folder of a finished run")
    summary = _parsed(path.read_bytes(), SUMMARY, path)
    return Run(os.fspath(workdir), config.to_dict(), summary, read_metrics(workdir))


def _parsed(text: bytes, kinds: Mapping[str, type], path: epath.Path) -> dict[str, Any]:
    """A JSON object with these keys and kinds of values; UserError names the file."""
    try:
        found = json.loads(text)
        for key, kind in kinds.items():
            if not _is(found[key], kind):
                raise ValueError(f"{key} is {found[key]!r}")
        if not _is(found.get("accuracy", {}), dict):
            raise ValueError(f"accuracy is {found['accuracy']!r}")
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"[:100]
        raise UserError(f"{path}: damaged ({why}); {ANEW}") from None
    return dict(found)


def _is(value: Any, kind: type) -> bool:
    if kind is dict:
        return isinstance(value, dict) and all(_is(number, float) for number in value.values())
    return isinstance(value, int | float if kind is float else kind)


def find_runs(folders: Sequence[str]) -> list[Run]:
    """The runs that the folders are, or have below them; a run's own pre-training is none.

    Raises:
        UserError: a folder without a finished run.
    """
    runs = []
    for folder in folders:
        found = []
        for path, inside, files in walk(folder, links=False):
            if "summary.json" in files or (not path and "config.json" in files):
                found.append(read_run(os.path.join(folder, path) if path else folder))
                inside.clear()
        if not found:
            raise UserError(f"{folder}: no finished run there, none has a summary.json")
        runs += found
    # One that is given twice, as itself and in its folder, is one.
    return list({os.path.realpath(run.workdir): run for run in runs}.values())


def by_eval_data(runs: Sequence[Run]) -> dict[EvalData, list[Run]]:
    """The runs on each test data, in the order met."""
    first: dict[tuple[Any, ...], EvalData] = {}
    groups: dict[EvalData, list[Run]] = {}
    for run in runs:
        data = run.eval_data()
        groups.setdefault(first.setdefault(data.identity, data), []).append(run)
    return groups


def grouped(runs: Sequence[Run], labels: Mapping[str, str] | None = None) -> list[Row]:
    """One row per setting, in the order met; runs that differ in their seed only share one.

    Args:
        labels: {workdir: label} where the caller knows better than `label_runs`.

    Returns:
        Rows of "label", "method", "learning_rate", "steps", "seeds", "trainable", "workdirs" and
        "metrics": {"t2v/R@1": (mean, standard deviation of the sample or None for one seed)}.
    """
    labels = labels or label_runs(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(labels[run.workdir], []).append(run)
    return [_row(label, group) for label, group in groups.items()]


def _row(label: str, group: Sequence[Run]) -> Row:
    first = group[0]
    scalars = [run.scalars() for run in group]
    return {
        "label": label,
        "method": first.summary["method"],
        "learning_rate": first.config["train"]["learning_rate"],
        "steps": first.summary["steps"],
        "seeds": len(group),
        "trainable": first.summary["trainable_params"],
        "workdirs": [run.workdir for run in group],
        "metrics": {
            key: mean_std([s[key] for s in scalars])
            for key in scalars[0]
            if all(key in s for s in scalars)
        },
    }


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Over seeds; of one there is no deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def label_runs(runs: Sequence[Run]) -> dict[str, str]:
    """{workdir: the method, and each setting in which runs of that method differ}."""
    settings = {run.workdir: run.settings() for run in runs}
    labels = {}
    for run in runs:
        of_method = [settings[r.workdir] for r in runs if _method(r) == _method(run)]
        mine = settings[run.workdir]
        varied = [
            f"{key.rpartition('.')[2]}={value}"
            for key, value in mine.items()
            if any(other.get(key) != value for other in of_method)
        ]
        labels[run.workdir] = " ".join([_method(run), *varied])
    return labels


def _method(run: Run) -> str:
    return str(run.summary["method"])


def best(rows: Sequence[Row]) -> dict[str, float]:
    """{metric: its best mean}, of the metrics that all rows have."""
    found = {}
    for key, _, more in COLUMNS:
        if rows and all(key in row["metrics"] for row in rows):
            means = [row["metrics"][key][0] for row in rows]
            found[key] = max(means) if more else min(means)
    return found


def format_mean(mean: float, std: float | None) -> str:
    """49.5, or 49.5 ± 1.2 over seeds."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, the best of each column bold."""
    winners = best(rows)
    columns = [column for column in COLUMNS if column[0] in winners]
    costs = [cost for cost in COSTS if rows and all(cost[0] in row for row in rows)]
    headings = ["method", "trained", *(heading for _, heading, _ in columns)]
    headings += [heading for _, heading, _ in costs]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in rows:
        cells = [row["label"], f"{row['trainable']:,}"]
        for key, _, _ in columns:
            cell = format_mean(*row["metrics"][key])
            cells.append(f"**{cell}**" if row["metrics"][key][0] == winners[key] else cell)
        lines.append(cells + [format(row[key], spec) for key, _, spec in costs])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
