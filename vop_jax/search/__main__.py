"""Finds videos, and moments of them, by what they show.

python -m vop_jax.search index FOLDER --clip clip.safetensors --prompts FILE --index DIR
python -m vop_jax.search query "a dog catches a frisbee" --index DIR -k 10
python -m vop_jax.search info --index DIR

Kill `index` whenever you like: the same command goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from vop_jax import cli
from vop_jax.cli import Parser, number, whole
from vop_jax.errors import UserError
from vop_jax.search import show


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m vop_jax.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = Parser(add_help=False)
    shared.add_argument("--index", required=True, metavar="DIR", help="the folder of the index")
    model = Parser(add_help=False)
    model.add_argument("--clip", default="", metavar="FILE", help="converted weights")
    model.add_argument("--prompts", default="", metavar="FILE", help="of a run; none: plain CLIP")
    given: dict[str, Any] = {"parents": [shared, model]}

    index = commands.add_parser("index", help="make an index, or bring it up to date", **given)
    index.add_argument("folder", nargs="?", default="", metavar="FOLDER", help="of videos")
    index.add_argument("--window", type=number(0.001), help="also index moments of so many seconds")
    index.add_argument("--stride", type=number(0.001), help="seconds between them; half the window")
    index.add_argument(
        "--captions", default="", metavar="FILE", help="texts to find: csv, jsonl, txt"
    )
    index.add_argument(
        "--store", default="", metavar="URI", help="FILE.db or http://HOST:PORT: Milvus"
    )
    index.add_argument("--workers", type=whole(1), default=0, help="decoding processes; one a core")
    index.add_argument("--batch", type=whole(1), default=16, help="clips embedded at once")
    index.add_argument(
        "--seconds", type=number(0.001), default=300.0, help="to decode one file, or part"
    )
    index.add_argument("--retry", action="store_true", help="files that could not be read")

    query = commands.add_parser("query", help="search", **given)
    query.add_argument("text", nargs="?", metavar="TEXT", help="what to look for")
    query.add_argument("--video", metavar="FILE", help="look for what is like a video")
    query.add_argument("--image", metavar="FILE", help="look for what is like a picture")
    query.add_argument("-k", type=whole(1), default=10, help="how many; 10 if not said")
    query.add_argument("--to", choices=("videos", "captions"), default="videos")
    query.add_argument("--folder", metavar="SUB", help="only in this part of the indexed folder")
    query.add_argument("--since", metavar="DATE", help="files changed on this day or later")
    query.add_argument("--until", metavar="DATE", help="files changed on this day or before")
    query.add_argument("--all-moments", action="store_true", help="not only the best of each file")
    query.add_argument("--explain", action="store_true", help="the score of each frame")
    query.add_argument("--json", action="store_true", help="a list of objects")

    info = commands.add_parser("info", help="what an index holds", parents=[shared])
    info.add_argument("--json", action="store_true", help="an object")
    return parser


def _index(args: argparse.Namespace) -> int:
    from vop_jax.search.asked import Request
    from vop_jax.search.build import make_index
    from vop_jax.search.updater import Making

    cli.set_up_logging()
    asked = Request(
        args.folder, args.clip, args.prompts, args.window, args.stride, args.captions, args.store
    )
    making = Making(args.workers, args.batch, args.seconds, args.retry)
    done = make_index(args.index, asked, making)
    print(show.done(args.index, done))
    return 1 if done.skipped else 0


def _query(args: argparse.Namespace) -> None:
    from vop_jax.search.searcher import open_searcher, read_image

    given = [what for what in (args.text, args.video, args.image) if what is not None]
    if len(given) != 1:
        raise UserError("give one of: a text, --video=FILE, --image=FILE")
    if args.text is not None and not args.text.strip():
        raise UserError("the query is empty; say what to look for")
    if args.explain and args.to == "captions":
        raise UserError("--explain: is of videos' frames, not --to=captions")
    cli.set_up_logging(logging.ERROR)  # warnings are printed below
    searcher = open_searcher(args.index, args.clip or None, args.prompts or None)
    retriever = searcher.retriever
    if args.text is not None:
        if retriever.count_truncated([args.text]):
            print("the query is longer than the model reads: its end is cut off", file=sys.stderr)
        vector = searcher.vector(args.text)
    elif args.video is not None:
        vector = retriever.embed_videos([args.video])[0]
    else:
        vector = retriever.embed_images([read_image(args.image)])[0]
    filters = {name: getattr(args, name) for name in ("to", "folder", "since", "until")}
    hits = searcher.nearest(vector, args.k, per_file=not args.all_moments, **filters)
    if not hits and args.to == "captions" and not searcher.index.counts()["captions"]:
        raise UserError(f"{args.index}: has no captions; index --captions=FILE brings them")
    rows = [show.row_of(searcher, hit, vector if args.explain else None) for hit in hits]
    print(json.dumps(rows, indent=2) if args.json else show.table(rows))


def _info(args: argparse.Namespace) -> None:
    from vop_jax.search.index import Index

    index = Index.open(args.index)
    print(json.dumps(show.about(index), indent=2) if args.json else show.about_text(index))


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
