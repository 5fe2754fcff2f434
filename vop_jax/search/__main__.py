"""Searches videos, and moments of them, by what they show.

vop search index FOLDER --clip clip.safetensors --prompts FILE --index DIR
vop search query "a dog catches a frisbee" --index DIR -k 10
vop search info --index DIR

You may kill `index` at any time: the same command continues.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from vop_jax import cli
from vop_jax.cli import Parser, number, printable, whole
from vop_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from vop_jax.search.index import Hit, Index
    from vop_jax.search.searcher import Searcher
    from vop_jax.search.updater import IndexReport

BAR = 40  # characters for the frame with the highest score
DTYPES = ("auto", "float32", "bfloat16")
LISTED = 20  # unreadable files that `info` lists as text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vop search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = Parser(add_help=False)
    shared.add_argument("--index", required=True, metavar="DIR", help="folder of the index")
    model = Parser(add_help=False)
    model.add_argument("--clip", default="", metavar="FILE", help="converted CLIP weights")
    model.add_argument(
        "--prompts", default="", metavar="FILE", help="prompts of a run; default: plain CLIP"
    )
    parents: dict[str, Any] = {"parents": [shared, model]}

    index = commands.add_parser("index", help="build an index, or update it", **parents)
    add = index.add_argument
    add("folder", nargs="?", default="", metavar="FOLDER", help="folder of videos")
    add("--window", type=number(0.001), help="also index moments of this many seconds")
    add("--stride", type=number(0.001), help="seconds between moments; default: half the window")
    add("--captions", default="", metavar="FILE", help="texts to search: csv, jsonl, txt")
    add("--store", default="", metavar="URI", help="Milvus: FILE.db or http://HOST:PORT")
    add("--dtype", choices=DTYPES, default="", help="of matrix products; default: the faster one")
    add("--workers", type=whole(1), default=0, help="decoding processes; default: one a core")
    add("--batch", type=whole(1), default=16, help="clips embedded at once")
    add("--seconds", type=number(0.001), default=300.0, help="time limit to decode one file")
    add("--retry", action="store_true", help="read unreadable files again")

    query = commands.add_parser("query", help="search", **parents)
    add = query.add_argument
    add("text", nargs="?", metavar="TEXT", help="what the videos show")
    add("--video", metavar="FILE", help="search by a video")
    add("--image", metavar="FILE", help="search by a picture")
    add("-k", type=whole(1), default=10, help="number of results; default: 10")
    add("--to", choices=("videos", "captions"), default="videos", help="what to search")
    add("--folder", metavar="SUB", help="only this part of the indexed folder")
    add("--since", metavar="DATE", help="only files changed on this day or later")
    add("--until", metavar="DATE", help="only files changed on this day or before")
    add("--all-moments", action="store_true", help="not only the best moment of each file")
    add("--explain", action="store_true", help="print the score of each frame")
    add("--json", action="store_true", help="print a list of objects")

    info = commands.add_parser("info", help="describe an index", parents=[shared])
    info.add_argument("--json", action="store_true", help="print an object")
    return parser


def _index(args: argparse.Namespace) -> int:
    from vop_jax.search.build import IndexRequest, build_index
    from vop_jax.search.updater import IndexOptions

    cli.set_up_logging()
    names = [field.name for field in dataclasses.fields(IndexRequest)]
    request = IndexRequest(**{name: getattr(args, name) for name in names})
    options = IndexOptions(args.workers, args.batch, args.seconds, args.retry)
    report = build_index(args.index, request, options)
    print(format_report(args.index, report))
    return 1 if report.skipped else 0


def _query(args: argparse.Namespace) -> None:
    from vop_jax.search.searcher import open_searcher, read_image

    if sum(query is not None for query in (args.text, args.video, args.image)) != 1:
        raise UserError("give one of: a text, --video=FILE, --image=FILE")
    if args.text is not None and not args.text.strip():
        raise UserError("the query is empty; say what to look for")
    if args.explain and args.to == "captions":
        raise UserError("--explain: scores the frames of videos; not with --to=captions")
    cli.set_up_logging(logging.ERROR)  # warnings are printed below
    searcher = open_searcher(args.index, args.clip or None, args.prompts or None)
    retriever = searcher.retriever
    if args.text is not None:
        vector = searcher.vector(args.text)  # first: it reads the tower meanwhile
        if retriever.count_truncated([args.text]):
            print("the query is longer than the model reads: its end is ignored", file=sys.stderr)
    elif args.video is not None:
        vector = retriever.embed_videos([args.video])[0]
    else:
        vector = retriever.embed_images([read_image(args.image)])[0]
    filters = {name: getattr(args, name) for name in ("to", "folder", "since", "until")}
    hits = searcher.nearest(vector, args.k, per_file=not args.all_moments, **filters)
    if not hits and args.to == "captions" and not searcher.index.counts()["captions"]:
        raise UserError(f"{args.index}: has no captions; add them with index --captions=FILE")
    rows = [_hit_row(searcher, hit, vector if args.explain else None) for hit in hits]
    print(json.dumps(rows, indent=2) if args.json else _format_hits(rows))


def _info(args: argparse.Namespace) -> None:
    from vop_jax.search.index import Index

    index = Index(args.index)
    if not args.json:
        print(_format_info(index))
        return
    failures = [{"path": path, "reason": reason} for path, reason in index.failures()]
    info = {**dataclasses.asdict(index.info), "counts": index.counts(), "failures": failures}
    print(json.dumps(info, indent=2))


def _hit_row(searcher: "Searcher", hit: "Hit", vector: "np.ndarray | None") -> dict[str, Any]:
    """A hit as `--json` prints it; with the score of each frame for a query's vector [E]."""
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
            frames = zip(*searcher.explain(vector, hit), strict=True)
        except UserError as error:
            row["unexplained"] = str(error)
        else:
            row["frames"] = [{"seconds": round(s, 3), "score": round(x, 4)} for s, x in frames]
    return row


def _format_hits(rows: list[dict[str, Any]]) -> str:
    """Rows of `_hit_row` as a table."""
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


def format_report(directory: str, report: "IndexReport") -> str:
    """What a run of `index` did, as text."""
    from vop_jax.search.index import Index

    numbers = dataclasses.asdict(report)
    truncated, skipped, unlisted = (
        numbers.pop(name) for name in ("truncated", "skipped", "unlisted")
    )
    counts = [f"{count} {name}" for name, count in numbers.items() if count]
    lines = [f"{directory}: {', '.join(counts) or 'no change'}"]
    if truncated:
        lines.append(f"{truncated} captions are longer than the model reads: it ignores their ends")
    for folder, reason in unlisted.items():
        lines.append(f"folder {folder} cannot be listed ({reason}): its indexed files stay")
    if skipped:
        path, reason = next(iter(skipped.items()))
        lines.append(
            f"not read: {len(skipped)}, first {path} ({reason}); their indexed moments stay; "
            "run it again when they can be read"
        )
    if failures := Index(directory).failures():
        path, reason = failures[0]
        lines.append(
            f"not readable: {len(failures)}, first {path} ({reason}); info --index {directory} "
            "lists all, --retry tries them again"
        )
    return "\n".join(map(printable, lines))


def _format_info(index: "Index") -> str:
    info, counts, failures = index.info, index.counts(), index.failures()
    moments = f"of {info.window:g} s every {info.stride:g} s" if info.window else "whole clips"
    prompts = f"{info.method}, {info.prompts or info.prompts_fingerprint[:12]}"
    lines = [
        f"folder    {info.folder}",
        f"files     {counts['files']}",
        f"moments   {counts['moments']}, {moments}, {info.frames} frames each",
        f"captions  {counts['captions']}",
        f"CLIP      {info.clip_name}, {info.clip}, in {info.dtype}",
        f"prompts   {prompts if info.prompts_fingerprint else 'none'}",
        f"vectors   {info.store or 'exact search, in this folder'}, {info.dim} numbers each",
        f"failed    {counts['failed']}",
        *(f"  {path}: {reason}" for path, reason in failures[:LISTED]),
    ]
    if len(failures) > LISTED:
        lines.append(f"  and {len(failures) - LISTED} more; --json lists all")
    return "\n".join(map(printable, lines))


COMMANDS: dict[str, Any] = {"index": _index, "query": _query, "info": _info}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int | None:
        args = _parser().parse_args(argv)
        return COMMANDS[args.command](args)

    return cli.run(program, resumes="index" in argv[:1])


if __name__ == "__main__":
    sys.exit(main())
