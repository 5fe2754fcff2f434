"""Queries that two runs answer differently, with the videos that each run ranks first."""

import base64
import io
import os
from collections.abc import Sequence
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
    frames = _frames(one, {video for pair in chosen for r in pair for video in r["top"]})

    def top(ranking: Ranking) -> list[RetrievedVideo]:
        return [
            RetrievedVideo(video, video == ranking["video"], frames.get(video, []))
            for video in ranking["top"][:TOP]
        ]

    examples = [Example(a["caption"], (a["rank"], b["rank"]), (top(a), top(b))) for a, b in chosen]
    return Comparison({name: len(queries) for name, queries in kinds.items()}, examples)


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
