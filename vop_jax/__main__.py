"""All programs in one command: `vop PROGRAM …`, or `python -m vop_jax PROGRAM …`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

MAIN = "vop_jax.main"
# name: (module, its first arguments, what it does)
PROGRAMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "train": (MAIN, ("--mode=train",), "train a method, or continue a run"),
    "eval": (MAIN, ("--mode=eval",), "evaluate a run"),
    "export": (MAIN, ("--mode=export",), "write a run's prompts or encoders in another format"),
    "params": (MAIN, ("--mode=params",), "count the trained parameters of each method"),
    "prepare": ("vop_jax.data.prepare", (), "pack the videos of a dataset into records"),
    "check": ("vop_jax.data.check", (), "check that a dataset is complete and fits a config"),
    "convert": ("vop_jax.convert", (), "convert CLIP weights from PyTorch's formats"),
    "search": ("vop_jax.search.__main__", (), "index a folder of videos, and search it"),
    "serve": ("vop_jax.serve.__main__", (), "serve a page and an API for search"),
    "push": ("vop_jax.push", (), "publish a run's prompts on the Hugging Face Hub"),
    "report": ("vop_jax.report.__main__", (), "make a page of tables and plots from runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names; returns its exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("--help", "-h", "help"):
        lines = (f"  vop {name:<9}{summary}" for name, (*_, summary) in PROGRAMS.items())
        print("usage: vop PROGRAM …\n", *lines, "\nvop PROGRAM --help lists its options", sep="\n")
        return 0
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean vop {near[0]}?" if near else f"there are {', '.join(PROGRAMS)}"
        print(f"error: vop {name}: no such program; {hint}", file=sys.stderr)
        return 2
    module, first, _ = PROGRAMS[name]
    if first and any(argument.lstrip("-").startswith("mode") for argument in arguments):
        print(
            f"error: vop {name}: takes no --mode; the program's name is the mode", file=sys.stderr
        )
        return 2
    status: int = importlib.import_module(module).main([*first, *arguments])
    return status


if __name__ == "__main__":
    sys.exit(main())
