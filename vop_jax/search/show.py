"""What the command line prints of an index and of what it finds."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from vop_jax.cli import printable
from vop_jax.errors import UserError
from vop_jax.search.index import Hit, Index
from vop_jax.search.searcher import Searcher
from vop_jax.search.updater import Done

BAR = 40  # characters of the highest score
LISTED = 20  # unreadable files that are shown as text


def row_of(searcher: Searcher, hit: Hit, vector: np.ndarray | None = None) -> dict[str, Any]:
    """A hit as `--json` shows it; with each frame's score for a query's `vector` [E]."""
    end = None if math.isinf(hit.end) else round(hit.end, 3)
    row: dict[str, Any] = {"path": hit.path, "score": round(hit.score, 4)}
    row |= {"start": round(hit.start, 3), "end": end}
    if hit.file_id:
        path = pathlib.Path(searcher.index.folder, hit.path)
        row |= {"path": str(path), "missing": not path.exists()}
    if hit.caption:
        return {"caption": hit.caption, **row}
    if vector is not None:
        try:
            scored = zip(*searcher.explain(vector, hit), strict=True)
        except UserError as error:
            row["unexplained"] = str(error)
        else:
            row["frames"] = [
                {"seconds": round(seconds, 3), "score": round(score, 4)}
                for seconds, score in scored
            ]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The same for people."""
    if not rows:
        return "nothing found"
    cells = [(f"{row['score']:.3f}", _span(row), _what(row)) for row in rows]
    width = max(len(span) for _, span, _ in cells)
    lines = []
    for row, (score, span, what) in zip(rows, cells, strict=True):
        lines.append(f"{score}  {span:>{width}}  {what}".rstrip())
        lines += _frames(row)
    return "\n".join(lines)


def _span(row: dict[str, Any]) -> str:
    if row["end"] is None:  # a caption of a whole video, or of none
        return f"{row['start']:.1f} s-" if row["start"] else ""
    return f"{row['start']:.1f}-{row['end']:.1f} s"


def _what(row: dict[str, Any]) -> str:
    missing = "  (missing)" if row.get("missing") else ""
    return printable("  ".join(filter(None, (row.get("caption"), row["path"]))) + missing)


def _frames(row: dict[str, Any]) -> list[str]:
    if "unexplained" in row:
        return [f"       {printable(row['unexplained'])}"]
    frames = row.get("frames", [])
    best = max((frame["score"] for frame in frames), default=0.0)
    return [
        f"       {frame['seconds']:8.2f} s  {frame['score']:6.3f}  "
        + "#" * max(0, round(BAR * frame["score"] / best) if best > 0 else 0)
        for frame in frames
    ]


def done(directory: str, what: Done) -> str:
    """What became of a folder, in a line or two."""
    counts = dataclasses.asdict(what)
    cut, skipped, unlisted = (counts.pop(name) for name in ("cut", "skipped", "unlisted"))
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no change"
    lines = [f"{directory}: {text}"]
    if cut:
        lines.append(f"{cut} captions are longer than the model reads: their ends are cut off")
    for folder, reason in unlisted.items():
        lines.append(f"folder {folder} cannot be listed ({reason}): what is indexed of it stays")
    if skipped:
        path, reason = next(iter(skipped.items()))
        lines.append(
            f"not read: {len(skipped)}, first {path} ({reason}); what is indexed of them stays; "
            "run it again when they are there"
        )
    failed = Index.open(directory).failures()
    if failed:
        path, reason = failed[0]
        lines.append(
            f"not readable: {len(failed)}, first {path} ({reason}); info --index {directory} "
            "lists all, --retry tries them again"
        )
    return "\n".join(map(printable, lines))


def about(index: Index) -> dict[str, Any]:
    """What an index holds and was made with."""
    failed = [{"path": path, "reason": reason} for path, reason in index.failures()]
    return {**dataclasses.asdict(index.info), "counts": index.counts(), "failures": failed}


def about_text(index: Index) -> str:
    """The same for people."""
    info, counts = index.info, index.counts()
    of_moments = f"of {info.window:g} s every {info.stride:g} s" if info.window else "whole clips"
    prompts = f"{info.method}, {info.prompts or info.prompts_fingerprint[:12]}"
    lines = [
        f"folder    {info.folder}",
        f"files     {counts['files']}",
        f"moments   {counts['moments']}, {of_moments}, {info.frames} frames each",
        f"captions  {counts['captions']}",
        f"CLIP      {info.clip_name}, {info.clip}",
        f"prompts   {prompts if info.prompts_fingerprint else 'none'}",
        f"vectors   {info.store or 'exact search, in this folder'}, {info.dim} numbers each",
        f"failed    {counts['failed']}",
    ]
    failed = index.failures()
    lines += [f"  {path}: {reason}" for path, reason in failed[:LISTED]]
    if len(failed) > LISTED:
        lines.append(f"  and {len(failed) - LISTED} more; --json lists all")
    return "\n".join(map(printable, lines))
