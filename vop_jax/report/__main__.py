"""python -m vop_jax.report RUN_DIR… [--output=report.html] [--compare=vop,vop_p]

python -m vop_jax.report [RUN_DIR…] --fill=docs/benchmarks/paper.md
"""

import argparse
import sys

from vop_jax.cli import Parser, run
from vop_jax.errors import UserError
from vop_jax.report.runs import find_runs
from vop_jax.storage.files import write_atomic


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m vop_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="of runs, or of folders of runs")
    parser.add_argument("--output", help="the page; report.html unless there is --fill")
    parser.add_argument("--compare", default="", help="labels of two rows, shown side by side")
    parser.add_argument("--fill", help="a document; its tables are made of the runs, or emptied")
    return parser


def _report() -> None:
    args = _parser().parse_args()
    output = args.output or ("" if args.fill else "report.html")
    pair = args.compare.split(",") if args.compare else []
    if len(pair) not in (0, 2):
        raise UserError(f"--compare={args.compare}: two labels with a comma between them")
    if pair and not output:
        raise UserError(f"--compare={args.compare}: is for a page; give --output too")
    if output and not args.runs:
        raise UserError("RUN_DIR: give at least one; only --fill alone does without")
    runs = find_runs(args.runs)
    files = {}
    if output:
        from vop_jax.report.page import render  # raises where its extra is missing

        files[output] = render(runs, pair).encode()
    if args.fill:
        from vop_jax.report import reproduce

        files[args.fill] = reproduce.filled(args.fill, runs)
        for run_of_other_data in reproduce.of_other_data(runs):
            kind = run_of_other_data.config["data"]["kind"]
            print(f"{run_of_other_data.workdir}: data.kind={kind}, in no table", file=sys.stderr)
        for benchmark in reproduce.of_benchmarks(runs):
            why = reproduce.why_not(benchmark)
            outcome = f"listed, not filled in: {why}" if why else "filled in"
            print(f"{benchmark.workdir}: {outcome}", file=sys.stderr)
    for path, content in files.items():
        write_atomic(path, content)
        print(path)


def main() -> int:
    """The command line; returns the exit status."""
    return run(_report)


if __name__ == "__main__":
    sys.exit(main())
