"""Compares finished runs on one page, or fills the tables of the paper's results with them.

vop report RUN_DIR… [--output=report.html] [--compare=vop,vop_p] [--failures=N]
vop report [RUN_DIR…] --fill=docs/benchmarks/paper.md
"""

import argparse
import sys
from collections.abc import Sequence

from vop_jax.cli import Parser, run, whole
from vop_jax.errors import UserError
from vop_jax.report.runs import find_runs
from vop_jax.storage.files import write_atomic


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vop report", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="workdirs, or folders of them")
    parser.add_argument("--output", help="the page; default report.html, or none with --fill")
    parser.add_argument("--compare", default="", help="labels of two rows to show side by side")
    parser.add_argument(
        "--failures",
        type=whole(0),
        default=6,
        metavar="N",
        help="queries of the best run to show that it answers worst; default %(default)s",
    )
    parser.add_argument("--fill", help="a document whose tables are filled from the runs")
    return parser


def _report(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    output = args.output or ("" if args.fill else "report.html")
    pair = args.compare.split(",") if args.compare else []
    if len(pair) not in (0, 2):
        raise UserError(f"--compare={args.compare}: give two labels with a comma between them")
    if pair and not output:
        raise UserError(f"--compare={args.compare}: needs a page; give --output too")
    if output and not args.runs:
        raise UserError("RUN_DIR: give at least one; only --fill without --output needs none")
    runs = find_runs(args.runs)
    files = {}
    if output:
        try:
            from vop_jax.report.page import render
        except ImportError as error:
            raise UserError(f'a page: {error}; pip install -e ".[report]"') from None

        files[output] = render(runs, pair, args.failures).encode()
    if args.fill:
        from vop_jax.report import reproduce

        files[args.fill] = reproduce.fill(args.fill, runs)
        for workdir, line in reproduce.notes(runs):
            print(f"{workdir}: {line}", file=sys.stderr)
    for path, content in files.items():
        write_atomic(path, content)
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run(lambda: _report(argv))


if __name__ == "__main__":
    sys.exit(main())
