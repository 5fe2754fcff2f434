"""Scores trained prompts with MTEB (github.com/embeddings-benchmark/mteb).

python -m vop_jax.interop.mteb --clip=clip.safetensors --prompts=DIR/prompts.safetensors \\
    --task=MSRVTTT2V --task=MSVDT2VRetrieval

MTEB downloads the videos, ranks, and keeps the results. Its tasks that pair texts with videos
have T2V or V2T in their names.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vop_jax import cli, load
from vop_jax.errors import UserError
from vop_jax.inference.retriever import DTYPES, Retriever

if TYPE_CHECKING:
    from vop_jax.interop.mteb_encoder import PromptEncoder

COLUMNS = ("recall_at_1", "recall_at_5", "recall_at_10", "ndcg_at_10")


def encoder(retriever: Retriever) -> "PromptEncoder":
    """A model for `mteb.evaluate`.

    Raises:
        UserError: mteb, or what it needs for videos, is not installed.
    """
    try:
        import torchcodec  # noqa: F401  which MTEB would miss only after it has loaded a task

        from vop_jax.interop.mteb_encoder import PromptEncoder
    except (ImportError, RuntimeError) as error:  # torchcodec finds no FFmpeg: RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'MTEB: {reason}; pip install -e ".[mteb]", and FFmpeg') from None
    return PromptEncoder(retriever)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m vop_jax.interop.mteb", description=__doc__)
    add = parser.add_argument
    add("--clip", required=True, metavar="FILE", help="converted CLIP weights, or hf://OWNER/NAME")
    add("--prompts", metavar="FILE", help="of a run, or hf://OWNER/NAME; default: plain CLIP")
    add("--task", action="append", required=True, metavar="NAME", help="one or more times")
    add("--output", metavar="DIR", help="for results; default $MTEB_CACHE or ~/.cache/mteb")
    add("--frames", type=cli.whole(1), metavar="F", help="default: as in training")
    add("--dtype", choices=DTYPES, default="float32", help="of matrix products")
    add("--batch", type=cli.whole(1), default=16, help="videos or texts at a time, default 16")
    return parser.parse_args(argv)


def _tasks(names: list[str]) -> list[Any]:
    import mteb

    try:
        tasks = list(mteb.get_tasks(tasks=names))
    except KeyError as error:
        raise UserError(f"--task: {error.args[0].removeprefix('KeyError: ')}") from None
    for task in tasks:  # before MTEB downloads its videos
        if task.metadata.category not in ("t2v", "v2t"):
            raise UserError(
                f"--task={task.metadata.name}: is of the kind {task.metadata.category}; must be "
                "t2v or v2t, texts and videos without sound"
            )
    return tasks


def run(args: argparse.Namespace) -> None:
    """Evaluates and prints a table in percent."""
    retriever = load(args.clip, args.prompts, frames=args.frames, dtype=args.dtype)
    model = encoder(retriever)
    import mteb
    from datasets.exceptions import DatasetNotFoundError

    tasks, cache = _tasks(args.task), mteb.ResultCache(args.output)
    try:
        results = mteb.evaluate(model, tasks, cache=cache, encode_kwargs={"batch_size": args.batch})
    except (ConnectionError, DatasetNotFoundError) as error:
        raise UserError(f"MTEB: {error}") from None
    print("\t".join(("task", *COLUMNS)))
    for result in results.task_results:
        for split, subsets in result.scores.items():
            for scores in subsets:
                values = (f"{100 * scores[column]:.1f}" for column in COLUMNS)
                print("\t".join((f"{result.task_name}/{split}", *values)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""

    def program() -> None:
        cli.set_up_logging()
        run(_parse(argv))

    return cli.run(program)


if __name__ == "__main__":
    sys.exit(main())
