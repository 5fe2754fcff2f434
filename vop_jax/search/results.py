"""Results of searches as a table, JSON, CSV or a timeline for video editors (OpenTimelineIO)."""

import csv
import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from vop_jax.cli import printable
from vop_jax.errors import UserError
from vop_jax.search import sources
from vop_jax.search.query import Hit
from vop_jax.storage.files import is_remote

BAR = 40  # characters for the frame with the highest score
COLUMNS = ("query", "path", "score", "start", "end", "caption", "missing")  # of CSV


@dataclasses.dataclass(frozen=True)
class Result:
    """What one query found.

    Attributes:
        query: the text, or the name of the file.
        hits: rows of `hit_row`, best first.
    """

    query: str
    hits: list[dict[str, Any]]


def hit_row(folder: str, hit: Hit) -> dict[str, Any]:
    """A hit as JSON has it; a file's path is absolute.

    Args:
        folder: of the indexed videos.
    """
    end = None if math.isinf(hit.end) else round(hit.end, 3)
    row: dict[str, Any] = {"path": hit.path, "score": round(hit.score, 4)}
    row |= {"start": round(hit.start, 3), "end": end}
    if hit.file_id:
        path = sources.locate(folder, hit.path)
        row |= {"path": path, "missing": not is_remote(path) and not os.path.exists(path)}
    if hit.frame is not None:
        row["frame"] = round(hit.frame, 3)
    return {"caption": hit.caption, **row} if hit.caption else row


def as_text(results: Sequence[Result], form: str, *, many: bool) -> str:
    """The content of a file, without its last line break.

    Args:
        form: table, json, csv or otio.
        many: also says in a table or in JSON which query found what.

    Raises:
        UserError: the package that makes timelines is missing.
    """
    if form == "csv":
        return as_csv(results)
    if form == "otio":
        from vop_jax.video.stream import frame_rates  # late: PyAV

        return as_timeline(results, frame_rates(moment_paths(results)))
    if form == "json":
        rows = [{"query": r.query, "found": bool(r.hits), "hits": r.hits} for r in results]
        return json.dumps(rows if many else results[0].hits, indent=2)
    headings = [f"{printable(r.query)}\n" if many else "" for r in results]
    tables = [heading + _table(r.hits) for heading, r in zip(headings, results, strict=True)]
    return "\n\n".join(tables)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "nothing found"
    segments = []
    for row in rows:
        segment = f"{row['start']:.1f}-{row['end'] or 0:.1f} s"
        if row["end"] is None:  # the caption of a whole video, or of none
            segment = f"{row['start']:.1f} s-" if row["start"] else ""
        segments.append(segment)
    width = max(map(len, segments))
    lines = []
    for row, segment in zip(rows, segments, strict=True):
        name = "  ".join(filter(None, (row.get("caption"), row["path"])))
        name += f"  (frame at {row['frame']:.2f} s)" if "frame" in row else ""
        name = printable(name + ("  (missing)" if row.get("missing") else ""))
        lines.append(f"{row['score']:.3f}  {segment:>{width}}  {name}".rstrip())
        if "unexplained" in row:
            lines.append(f"       {printable(row['unexplained'])}")
        frames = row.get("frames", [])
        best = max((frame["score"] for frame in frames), default=0.0)
        for frame in frames:
            bar = "#" * max(0, round(BAR * frame["score"] / best) if best > 0 else 0)
            lines.append(f"       {frame['seconds']:8.2f} s  {frame['score']:6.3f}  {bar}")
    return "\n".join(lines)


def as_csv(results: Sequence[Result]) -> str:
    """A line for each hit, below the names of the columns."""
    table = io.StringIO()
    rows = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    for result in results:
        rows.writerows({"query": result.query, **hit} for hit in result.hits)
    return table.getvalue().removesuffix("\n")


def moment_paths(results: Sequence[Result]) -> list[str]:
    """The files of all hits, each once, in the order of the results."""
    return list(dict.fromkeys(hit["path"] for result in results for hit in result.hits))


def as_timeline(results: Sequence[Result], rates: dict[str, float]) -> str:
    """OpenTimelineIO's JSON: a track for each query, in it a clip for each moment, best first.

    Args:
        results: moments of videos, no captions.
        rates: {path: frames per second}.

    Raises:
        UserError: the package is missing.
    """
    try:
        import opentimelineio as otio
    except ImportError as error:
        raise UserError(f'a timeline: {error}; pip install -e ".[otio]"') from None

    timeline = otio.schema.Timeline("search")
    for result in results:
        track = otio.schema.Track(_text(result.query))
        for hit in result.hits:
            rate, address = rates[hit["path"]], hit["path"]
            if not is_remote(address):
                address = pathlib.Path(address).as_uri()
            start = round(hit["start"] * rate)  # whole frames of the file
            frames = max(1, round(hit["end"] * rate) - start)
            clip = otio.schema.Clip(
                _text(os.path.basename(hit["path"])),
                otio.schema.ExternalReference(address),
                otio.opentime.TimeRange(start, frames, rate),
                {"vop_jax": {"query": _text(result.query), "score": hit["score"]}},
            )
            track.append(clip)
        timeline.tracks.append(track)
    return otio.adapters.write_to_string(timeline, "otio_json")


def _text(name: str) -> str:
    """A name that the library can store: bytes that are not UTF-8 become question marks."""
    return name.encode(errors="replace").decode()
