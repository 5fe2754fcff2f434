"""Queries and what two runs found for them, as pictures."""

import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vop_jax.data.records.read import stored_frames
from vop_jax.errors import UserError
from vop_jax.report.runs import Run

SHOWN = 3  # clips of each run per query
PICTURES = 4  # frames of each clip
HEIGHT = 72  # pixels; smaller frames are enlarged by the browser

Ranking = dict[str, Any]  # a line of rankings.jsonl


@dataclasses.dataclass(frozen=True)
class Answer:
    """A clip that a run found: whether it is the caption's own, and frames as data URIs."""

    video: str
    right: bool
    frames: list[str]


@dataclasses.dataclass(frozen=True)
class Example:
    """A query, its own clip's rank in each of two runs, and what they found first."""

    caption: str
    ranks: tuple[float, float]
    answers: tuple[list[Answer], list[Answer]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs on the same queries.

    Attributes:
        tally: {"both right": number of queries, …}, of rank 1.
        examples: the first queries, in the order of the split, of each kind.
    """

    tally: dict[str, int]
    examples: list[Example]


def compare(one: Run, two: Run, count: int = 6) -> Comparison:
    """Shares `count` examples between the queries only one of two runs gets right.

    Where those are too few, queries that neither and both get right follow. The choice is by
    order of the split, not by looks.

    Raises:
        UserError: a run without rankings, or the two ranked other queries.
    """
    ranked = one.rankings(), two.rankings()
    if [a["caption"] for a in ranked[0]] != [b["caption"] for b in ranked[1]]:
        raise UserError(f"{one.workdir} and {two.workdir} ranked other queries")
    pairs = list(zip(*ranked, strict=True))
    kinds: dict[tuple[bool, bool], list[tuple[Ranking, Ranking]]] = {
        kind: [] for kind in ((False, True), (True, False), (False, False), (True, True))
    }
    for a, b in pairs:
        kinds[a["rank"] == 1, b["rank"] == 1].append((a, b))
    names = ("only the second right", "only the first right", "neither right", "both right")
    tally = {name: len(of_kind) for name, of_kind in zip(names, kinds.values(), strict=True)}
    half = -(-count // 2)
    only_two, only_one, neither, both = kinds.values()
    chosen = (only_two[:half] + only_one[: count - half] + neither + both)[:count]
    pictures = _pictures(one, {video for a, b in chosen for r in (a, b) for video in r["top"]})
    examples = [
        Example(
            a["caption"], (a["rank"], b["rank"]), (_answers(a, pictures), _answers(b, pictures))
        )
        for a, b in chosen
    ]
    return Comparison(tally, examples)


def _answers(ranking: Ranking, pictures: dict[str, list[str]]) -> list[Answer]:
    return [
        Answer(video, video == ranking["video"], pictures.get(video, []))
        for video in ranking["top"][:SHOWN]
    ]


def _pictures(run: Run, videos: set[str]) -> dict[str, list[str]]:
    """{video: frames}; empty where the records are gone."""
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
    """At most HEIGHT pixels high."""
    picture = Image.open(io.BytesIO(jpeg))
    if picture.height > HEIGHT:
        width = max(1, round(picture.width * HEIGHT / picture.height))
        smaller = io.BytesIO()
        picture.resize((width, HEIGHT), Image.Resampling.BICUBIC).save(smaller, "JPEG", quality=85)
        jpeg = smaller.getvalue()
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
