"""python -m vop_jax.report RUN_DIR… [--output=report.html] [--compare=vop,vop_p]"""

import argparse
import sys

from vop_jax.errors import UserError
from vop_jax.report.runs import find_runs
from vop_jax.tensorfile import write_atomic


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vop_jax.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="of runs, or of folders of runs")
    parser.add_argument("--output", default="report.html")
    parser.add_argument("--compare", default="", help="labels of two rows, shown side by side")
    args = parser.parse_args()
    pair = args.compare.split(",") if args.compare else []
    try:
        if len(pair) not in (0, 2):
            raise UserError(f"--compare={args.compare}: two labels with a comma between them")
        from vop_jax.report.page import render  # tells where its extra is missing

        page = render(find_runs(args.runs), pair)
        write_atomic(args.output, page.encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.output}: {error.strerror}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
