"""Searches videos, and moments of them, by what they show.

vop search index FOLDER --clip clip.safetensors --prompts FILE --index DIR
vop search query "a dog catches a frisbee" --index DIR -k 10
vop search info --index DIR
vop search recall --store http://HOST:PORT#NAME

An index is a folder, --index DIR, or is on a Milvus server, --store http://HOST:PORT#NAME.
You may kill `index` at any time: the same command continues.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from vop_jax import cli
from vop_jax.cli import Parser, number, printable, whole
from vop_jax.errors import UserError
from vop_jax.search.stores import client
from vop_jax.storage.files import write_atomic

if TYPE_CHECKING:
    import numpy as np

    from vop_jax.search.collection.index import CollectionIndex
    from vop_jax.search.index import Hit, Index
    from vop_jax.search.searcher import Searcher
    from vop_jax.search.updater import IndexReport

FORMATS = ("table", "json", "csv", "otio")  # the last three are endings of files, too
DTYPES = ("auto", "float32", "bfloat16")
LISTED = 20  # unreadable files that `info` lists as text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vop search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = Parser(add_help=False)
    shared.add_argument("--index", default="", metavar="DIR", help="folder of the index")
    shared.add_argument(
        "--store", default="", metavar="URI", help="Milvus; without --index, a server has all"
    )
    model = Parser(add_help=False)
    model.add_argument(
        "--clip", default="", metavar="FILE", help="converted CLIP weights, or hf://OWNER/NAME"
    )
    model.add_argument(
        "--prompts", default="", metavar="FILE", help="prompts of a run; default: plain CLIP"
    )
    parents: dict[str, Any] = {"parents": [shared, model]}

    index = commands.add_parser("index", help="build an index, or update it", **parents)
    add = index.add_argument
    add("folder", nargs="?", default="", metavar="FOLDER", help="folder of videos")
    add("--window", type=number(0.001), help="also index moments of this many seconds")
    add("--stride", type=number(0.001), help="seconds between moments; default: half the window")
    add("--shots", action="store_true", help="also index the shots of the videos")
    add("--keep_frames", action="store_true", help="keep vectors of frames, for query --by_frames")
    add("--captions", default="", metavar="FILE", help="texts to search: csv, jsonl, txt")
    add(
        "--vector_index", default="", metavar="KIND:…", help="on a server: FLAT, HNSW:M=16,ef=64, …"
    )
    add("--dtype", choices=DTYPES, default="", help="of matrix products; default: the faster one")
    add("--workers", type=whole(1), default=0, help="decoding processes; default: one a core")
    add("--batch", type=whole(1), default=16, help="clips embedded at once")
    add("--seconds", type=number(0.001), default=300.0, help="time limit to decode one file")
    add("--retry", action="store_true", help="read unreadable files again")
    add("--beam_options", metavar="TEXT", help="on workers of Apache Beam: --runner=DirectRunner …")

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
    add("--min_score", default="auto", metavar="X", help="least score of a result: auto, none, X")
    add("--by_frames", action="store_true", help="re-rank the best moments by their frames")
    add("--explain", action="store_true", help="print the score of each frame")
    add("--queries", metavar="FILE", help="search a text a line, all at once; -: of stdin")
    add("--out", metavar="FILE", help="write the results to a file")
    add("--format", choices=FORMATS, help="of the results; default: by the ending of --out")
    add("--json", action="store_true", help="the same as --format=json")

    info = commands.add_parser("info", help="describe an index", parents=[shared])
    info.add_argument("--json", action="store_true", help="print an object")

    recall = commands.add_parser("recall", help="compare with exact search", parents=[shared])
    recall.add_argument(
        "-k", type=whole(1, 1000), default=10, help="number of results; default: 10"
    )
    return parser


def _index(args: argparse.Namespace) -> int:
    from vop_jax.search.build import IndexRequest, build_index
    from vop_jax.search.searcher import open_index
    from vop_jax.search.updater import IndexOptions
    from vop_jax.training import malloc

    _place(args)
    cli.set_up_logging()
    malloc.keep_freed_memory()
    names = [field.name for field in dataclasses.fields(IndexRequest)]
    request = IndexRequest(**{name: getattr(args, name) for name in names})
    options = IndexOptions(args.workers, args.batch, args.seconds, args.retry)
    for name in ("beam_options", "vector_index"):
        if args.index and getattr(args, name):
            raise UserError(f"--{name}: is for an index on a server, --store without --index")
    if args.index:
        report = build_index(args.index, request, options)
    else:
        from vop_jax.search.collection.build import build_collection

        report = build_collection(request, options, beam=cli.beam_options(args.beam_options))
    with contextlib.closing(open_index(_place(args))) as index:
        print(format_report(index, report))
    return 1 if report.skipped else 0


def _query(args: argparse.Namespace) -> None:
    from vop_jax.search import results
    from vop_jax.search.searcher import open_searcher, read_image

    form = _checked_format(args)
    texts = [args.text] if args.queries is None else _read_queries(args.queries)
    cli.set_up_logging(logging.ERROR)  # warnings are printed below
    searcher = open_searcher(_place(args), args.clip or None, args.prompts or None)
    retriever = searcher.retriever
    if args.video is not None:
        texts, vectors = [args.video], retriever.embed_videos([args.video])
    elif args.image is not None:
        texts, vectors = [args.image], retriever.embed_images([read_image(args.image)])
    else:
        vectors = searcher.vectors(texts)  # first: it reads the tower meanwhile
        if count := retriever.count_truncated(texts):
            which, end = "the query is", "its end is"
            if args.queries is not None:
                which, end = f"{count} of {len(texts)} queries are", "their ends are"
            print(f"{which} longer than the model reads: {end} ignored", file=sys.stderr)
    names = ("to", "folder", "since", "until", "by_frames")
    filters = {name: getattr(args, name) for name in names}
    by_text = args.video is None and args.image is None
    filters["min_score"] = "none" if args.min_score == "auto" and not by_text else args.min_score
    hits = searcher.index.search(vectors, args.k, per_file=not args.all_moments, **filters)
    if not any(hits) and args.to == "captions" and not searcher.index.counts()["captions"]:
        raise UserError(
            f"{searcher.index.name}: has no captions; add them with index --captions=FILE"
        )
    automatic = filters["min_score"] == "auto" and args.to == "videos"
    if automatic and not all(hits) and searcher.index.calibration():
        print("scores that may be chance are left out; see --min_score=none", file=sys.stderr)
    folder, found = searcher.index.folder, []
    for text, vector, own in zip(texts, vectors, hits, strict=True):
        rows = [results.hit_row(folder, hit) for hit in own]
        if args.explain:
            for row, hit in zip(rows, own, strict=True):
                row |= _explanation(searcher, hit, vector)
        found.append(results.Result(text, rows))
    text = results.as_text(found, form, many=args.queries is not None)
    if args.out is None:
        print(text)
    else:
        write_atomic(args.out, f"{text}\n".encode(errors="surrogateescape"))
        count = sum(map(len, hits))
        print(printable(f"{args.out}: {count} {'result' if count == 1 else 'results'}"))


def _checked_format(args: argparse.Namespace) -> str:
    """The format of the results.

    Raises:
        UserError: options of a query that exclude each other, or a format is missing.
    """
    queries = args.text, args.queries, args.video, args.image
    if sum(query is not None for query in queries) != 1:
        raise UserError("give one of: a text, --video=FILE, --image=FILE, --queries=FILE")
    if args.text is not None and not args.text.strip():
        raise UserError("the query is empty; say what to look for")
    if args.json and args.format not in (None, "json"):
        raise UserError(f"--json: not with --format={args.format}")
    if args.out is not None and os.path.isdir(args.out):
        raise UserError(f"--out={args.out}: a folder; give a file")
    form = "json" if args.json else args.format
    if form is None and args.out is not None:
        form = pathlib.Path(args.out).suffix.lower().removeprefix(".")
        if form not in FORMATS[1:]:
            endings = ", ".join(f".{name}" for name in FORMATS[1:])
            raise UserError(f"--out={args.out}: ends in none of {endings}; give --format")
    form = form or "table"
    if args.explain and args.to == "captions":
        raise UserError("--explain: scores the frames of videos; not with --to=captions")
    if args.explain and form not in ("table", "json"):
        raise UserError(f"--explain: needs --format table or json, not {form}")
    if form == "otio" and args.to == "captions":
        raise UserError("--format=otio: a timeline of moments; not with --to=captions")
    return form


def _read_queries(path: str) -> list[str]:
    """The lines of a file that are not empty; "-" is stdin."""
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig", closefd=path != "-") as file:
            queries = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"--queries={path}: not text in UTF-8") from None
    if not queries:
        raise UserError(f"--queries={path}: no queries in it; give one a line")
    return queries


def _explanation(searcher: "Searcher", hit: "Hit", vector: "np.ndarray") -> dict[str, Any]:
    """The score of each frame for a query's vector [E], or why there is none."""
    try:
        frames = zip(*searcher.explain(vector, hit), strict=True)
    except UserError as error:
        return {"unexplained": str(error)}
    return {"frames": [{"seconds": round(s, 3), "score": round(x, 4)} for s, x in frames]}


def _info(args: argparse.Namespace) -> None:
    from vop_jax.search.searcher import open_index

    index = open_index(_place(args))
    if not args.json:
        print(_format_info(index))
        return
    failures = [{"path": path, "reason": reason} for path, reason in index.failures()]
    info = {**dataclasses.asdict(index.info), "counts": index.counts(), "failures": failures}
    known = index.calibration()
    info["min_score"] = known and {n: v for n, v in vars(known).items() if n != "general"}
    print(json.dumps(info, indent=2))


def _place(args: argparse.Namespace) -> str:
    """The folder of the index, or its address.

    Raises:
        UserError: neither is given, or both for an index that exists, or a store that holds
            vectors only.
    """
    if args.index and args.store and args.command != "index":
        raise UserError(f"--store={args.store}: not with --index, which names its store itself")
    if not args.index and not client.is_server(args.store):
        raise UserError("give --index=DIR, or --store=http://HOST:PORT#NAME for one on a server")
    return args.index or args.store


def format_report(index: "Index | CollectionIndex", report: "IndexReport") -> str:
    """What a run of `index` did, as text."""
    numbers = dataclasses.asdict(report)
    truncated, skipped, unlisted = (
        numbers.pop(name) for name in ("truncated", "skipped", "unlisted")
    )
    counts = [f"{count} {name}" for name, count in numbers.items() if count]
    lines = [f"{index.name}: {', '.join(counts) or 'no change'}"]
    if truncated:
        lines.append(f"{truncated} captions are longer than the model reads: it ignores their ends")
    if unlisted:
        folder, reason = next(iter(unlisted.items()))
        lines.append(
            f"folders that cannot be listed: {len(unlisted)}, first {folder} ({reason}); "
            "their indexed files stay"
        )
    if skipped:
        path, reason = next(iter(skipped.items()))
        lines.append(
            f"not read: {len(skipped)}, first {path} ({reason}); their indexed moments stay; "
            "run it again when they can be read"
        )
    if failures := index.failures():
        path, reason = failures[0]
        lines.append(
            f"not readable: {len(failures)}, first {path} ({reason}); info lists all, "
            "--retry tries them again"
        )
    return "\n".join(map(printable, lines))


def _format_info(index: "Index | CollectionIndex") -> str:
    from vop_jax.video.shots import LONGEST, SHORTEST

    info, counts, failures = index.info, index.counts(), index.failures()
    moments = f"of {info.window:g} s every {info.stride:g} s" if info.window else "whole clips"
    moments = f"shots of {SHORTEST:g} to {LONGEST:g} s" if info.shots else moments
    prompts = f"{info.method}, {info.prompts or info.prompts_fingerprint[:12]}"
    lines = [
        f"folder    {info.folder}",
        f"files     {counts['files']}",
        f"moments   {counts['moments']}, {moments}, {info.frames} frames each",
        f"captions  {counts['captions']}",
        f"CLIP      {info.clip_name}, {info.clip}, in {info.dtype}",
        f"prompts   {prompts if info.prompts_fingerprint else 'none'}",
        f"vectors   {info.store or 'exact search, in this folder'}, {info.dim} numbers each",
        *(["frames    kept, for query --by_frames"] if info.keep_frames else ()),
        f"minimum   {_format_minimum(index)}",
        f"failed    {counts['failed']}",
        *(f"  {path}: {reason}" for path, reason in failures[:LISTED]),
    ]
    if len(failures) > LISTED:
        lines.append(f"  and {len(failures) - LISTED} more; --json lists all")
    return "\n".join(map(printable, lines))


def _format_minimum(index: "Index | CollectionIndex") -> str:
    """What `--min_score=auto` does to the texts that it was made with."""
    if (known := index.calibration()) is None:
        return "none: fewer than 50 moments, or made by an older version"
    passed = f"{100 * known.passed:.0f} % of general captions pass"
    if not known.captions:
        return passed
    return f"{passed}, {100 * known.missed:.0f} % of {known.captions} captions are missed"


def _recall(args: argparse.Namespace) -> None:
    from vop_jax.search.collection import recall

    if args.index or not client.is_server(args.store):
        raise UserError("recall: is for an index on a server, --store; one in a folder is exact")
    found = recall.measure(args.store, args.k)
    print(f"recall@{args.k}  {found.recall:.4f}, {found.queries} texts, {found.moments} moments")
    print(f"a search   {found.median:.1f} ms, one in twenty {found.slow:.1f} ms or more")


COMMANDS: dict[str, Any] = {"index": _index, "query": _query, "info": _info, "recall": _recall}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def program() -> int | None:
        args = _parser().parse_args(argv)
        return COMMANDS[args.command](args)

    return cli.run(program, resumes="index" in argv[:1])


if __name__ == "__main__":
    sys.exit(main())
