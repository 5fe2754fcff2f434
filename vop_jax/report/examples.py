"""Queries that two runs answer differently, and one run's failures, with pictures."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vop_jax.data.records.read import stored_frames
from vop_jax.errors import UserError
from vop_jax.report.runs import FinishedRun

TOP = 3  # videos of each run per query
PICTURES = 4  # frames of each video
HEIGHT = 72  # pixels; the browser enlarges smaller frames

Ranking = dict[str, Any]  # a line of rankings.jsonl


class RetrievedVideo(NamedTuple):
    """A video that a run ranks first; `right`: the caption belongs to it."""

    video: str
    right: bool
    frames: list[str]  # data URIs


class Example(NamedTuple):
    """A query, the rank of its own video in each of two runs, and the first videos of each."""

    caption: str
    ranks: tuple[float, float]
    videos: tuple[list[RetrievedVideo], list[RetrievedVideo]]


class Failure(NamedTuple):
    """A query whose own video is not first: its rank, the video, and the videos ranked first."""

    caption: str
    rank: float
    own: RetrievedVideo
    top: list[RetrievedVideo]


class Comparison(NamedTuple):
    """Two runs on the same queries."""

    tally: dict[str, int]  # {"both right": number of queries, …}; right: the own video has rank 1
    examples: list[Example]  # the first queries of each kind, in the order of the split


def compare(one: FinishedRun, two: FinishedRun, count: int = 6) -> Comparison:
    """Shows `count` queries, half of them right only in the first run, half only in the second.

    If there are too few, queries follow that neither or both get right. The order of the split
    decides, not the looks.

    Raises:
        UserError: a run has no rankings, or the two have different queries.
    """
    rankings = one.rankings(), two.rankings()
    if [a["caption"] for a in rankings[0]] != [b["caption"] for b in rankings[1]]:
        raise UserError(f"{one.workdir} and {two.workdir} ranked other queries")
    pairs = list(zip(*rankings, strict=True))

    def of_kind(*right: bool) -> list[tuple[Ranking, Ranking]]:
        return [pair for pair in pairs if tuple(r["rank"] == 1 for r in pair) == right]

    kinds = {
        "only the second right": of_kind(False, True),
        "only the first right": of_kind(True, False),
        "neither right": of_kind(False, False),
        "both right": of_kind(True, True),
    }
    only_two, only_one, neither, both = kinds.values()
    half = -(-count // 2)
    chosen = (only_two[:half] + only_one[: count - half] + neither + both)[:count]
    frames = _frames(one, {video for pair in chosen for r in pair for video in r["top"][:TOP]})
    examples = [
        Example(a["caption"], (a["rank"], b["rank"]), (_top(a, frames), _top(b, frames)))
        for a, b in chosen
    ]
    return Comparison({name: len(queries) for name, queries in kinds.items()}, examples)


def failures(run: FinishedRun, count: int) -> list[Failure]:
    """The queries whose own video ranks worst, at most `count`, worst first.

    Raises:
        UserError: the run has no rankings.
    """
    wrong = [ranking for ranking in run.rankings() if ranking["rank"] > 1]
    worst = sorted(wrong, key=lambda ranking: -ranking["rank"])[:count]
    frames = _frames(run, {video for r in worst for video in (r["video"], *r["top"][:TOP])})
    return [
        Failure(
            ranking["caption"],
            ranking["rank"],
            RetrievedVideo(ranking["video"], True, frames.get(ranking["video"], [])),
            _top(ranking, frames),
        )
        for ranking in worst
    ]


def _top(ranking: Ranking, frames: Mapping[str, list[str]]) -> list[RetrievedVideo]:
    return [
        RetrievedVideo(video, video == ranking["video"], frames.get(video, []))
        for video in ranking["top"][:TOP]
    ]


def _frames(run: FinishedRun, videos: set[str]) -> dict[str, list[str]]:
    """{video: frames as data URIs}; empty if the records are gone."""
    data = run.config["data"]
    directory = data["records"] or os.path.join(run.workdir, "records")
    try:
        stored = stored_frames(directory, data["eval_split"], videos)
    except UserError:
        return {}
    return {video: [_data_uri(f) for f in _spread(frames)] for video, frames in stored.items()}


def _spread(frames: Sequence[bytes]) -> list[bytes]:
    at = np.linspace(0, len(frames) - 1, min(PICTURES, len(frames))).round().astype(int)
    return [frames[i] for i in at]


def _data_uri(jpeg: bytes) -> str:
    picture = Image.open(io.BytesIO(jpeg))
    if picture.height > HEIGHT:
        width = max(1, round(picture.width * HEIGHT / picture.height))
        smaller = io.BytesIO()
        picture.resize((width, HEIGHT), Image.Resampling.BICUBIC).save(smaller, "JPEG", quality=85)
        jpeg = smaller.getvalue()
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
