"""What stands first for a caption of the motion benchmark: its clip, the reversal, or another.

    python -m benchmarks.ladder --workdir=DIR
    python -m benchmarks.first_found --workdir=DIR/methods

Splits the misses of R@1, text to video, by what was taken for the caption's clip.
"""

import argparse
import collections
import json
import pathlib

from vop_jax.config.base import RANKINGS_FILE
from vop_jax.data.datasets.clips import DATASET
from vop_jax.report.runs import format_mean, mean_std

KINDS = ("own", "reversal", "other speed", "another")


def first_found(rankings: pathlib.Path) -> dict[str, float]:
    """{kind: percent of the captions}.

    Args:
        rankings: of a run on the clips, where each caption is written once.
    """
    lines = [json.loads(line) for line in rankings.read_text().splitlines()]
    caption_of = {line["video"]: line["caption"] for line in lines}
    counts: collections.Counter[str] = collections.Counter()
    for line in lines:
        turned = DATASET.contrasts(line["caption"])
        kinds = {
            line["caption"]: "own",
            turned["direction"]: "reversal",
            turned["speed"]: "other speed",
        }
        counts[kinds.get(caption_of[line["top"][0]], "another")] += 1
    return {kind: 100 * counts[kind] / len(lines) for kind in KINDS}


def table(workdir: pathlib.Path) -> str:
    """Markdown, a row for each METHOD of METHOD/SEED/: mean, and deviation of several seeds."""
    runs: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    for rankings in sorted(workdir.glob(f"*/*/{RANKINGS_FILE}")):
        try:
            runs[rankings.parts[-3]].append(first_found(rankings))
        except (KeyError, ValueError) as error:
            raise SystemExit(f"{rankings}: not of the motion benchmark's clips ({error})") from None
    if not runs:
        raise SystemExit(f"--workdir={workdir}: no METHOD/SEED/{RANKINGS_FILE} in it")
    rows = [f"| run | {' | '.join(KINDS)} |", f"| --- |{' ---: |' * len(KINDS)}"]
    for method, shares in runs.items():
        cells = [format_mean(*mean_std([one[kind] for one in shares])) for kind in KINDS]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="with METHOD/SEED/")
    print(table(parser.parse_args().workdir))


if __name__ == "__main__":
    main()
