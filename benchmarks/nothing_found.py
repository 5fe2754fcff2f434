"""How often a search finds nothing, for what an index shows and for what it does not show.

    python -m vop_jax.main --config=demo --workdir=/tmp/vop_demo
    python -m benchmarks.nothing_found /tmp/vop_demo

Indexes the demo's held-out clips, without and with their captions, and searches for these captions,
for phrases that have nothing to do with the clips, and for captions of other motions. Then it
leaves out all clips of one colour, or of one shape, after the other, and searches for them.
"""

import argparse
import csv
import pathlib
import tempfile
from collections.abc import Sequence

from vop_jax.data.datasets.shapes import COLOURS, SHAPES
from vop_jax.inference.retriever import Retriever, load
from vop_jax.search.build import IndexRequest, build_index
from vop_jax.search.searcher import Searcher, open_searcher

Rows = list[dict[str, str]]  # of the demo's annotations

PHRASES = (
    *("spaceship", "a dog catches a frisbee", "two people kiss", "someone solders a circuit board"),
    *("elephant", "a red car", "sunset over the sea", "how to tie a tie", "screenshot of code"),
    *("wedding", "surgery", "ice hockey", "the president gives a speech", "cooking pasta"),
    *("kittens", "a child blows out candles", "drone view of mountains", "bowling", "dentist"),
    *("underwater coral reef", "violin concert", "skateboard trick", "traffic jam at night"),
    *("baking bread", "a snake", "rocket launch", "golf swing", "a lion hunts", "news anchor"),
    *("my grandmother", "unboxing a phone", "a river in autumn", "people protest", "a whale"),
    *("yoga class", "a broken window", "fireworks", "someone plays chess", "a train station"),
    *("a baby laughs", "graduation", "welding", "a horse race", "rain on a tent", "karaoke"),
)


def make(root: pathlib.Path, demo: pathlib.Path, rows: Rows, model: Retriever, captions: bool):
    """A searcher of an index of some clips, in a new folder."""
    films = root / "films"
    films.mkdir(parents=True)
    for row in rows:
        (films / row["video"]).symlink_to(demo / "videos" / row["video"])
    table = root / "captions.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, ("video", "caption"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    request = IndexRequest(str(films), captions=str(table) if captions else "")
    build_index(root / "index", request, retriever=model)
    return open_searcher(root / "index", retriever=model)


def nothing(searcher: Searcher, queries: Sequence[str]) -> list[bool]:
    """Whether each query finds nothing."""
    return [not hits for hits in searcher.texts(queries, k=1)]


def measure(demo: pathlib.Path, root: pathlib.Path, captions: bool) -> dict[str, list[bool]]:
    """{kind of query: whether each of them found nothing}."""
    model = load(demo / "clip.safetensors", demo / "prompts.safetensors")
    with open(demo / "videos" / "annotations.csv", newline="") as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if row["split"] == "test"]
    shown = [row["caption"] for row in rows]
    searcher = make(root / "all", demo, rows, model, captions)
    counts = {
        "captions of indexed clips": nothing(searcher, shown),
        "other phrases": nothing(searcher, PHRASES),
        "captions of other motions": nothing(
            searcher, sorted({row["caption"] for row in every} - {*shown})
        ),
    }
    for kind, words in (("colour", COLOURS), ("shape", SHAPES)):
        missed = counts[f"captions of a {kind} that no clip has"] = []
        for word in words:
            own = [row for row in rows if f" {word} " in row["caption"]]
            others = [row for row in rows if row not in own]
            searcher = make(root / word, demo, others, model, captions)
            missed += nothing(searcher, [row["caption"] for row in own])
    return counts


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=pathlib.Path, help="workdir of the demo")
    demo = parser.parse_args().demo.resolve()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        plain, informed = (measure(demo, root / str(c), c) for c in (False, True))
    print("| query | number | nothing found, % | with captions, % |\n| --- | ---: | ---: | ---: |")
    for kind, empty in plain.items():
        shares = (f"{100 * sum(found) / len(found):.1f}" for found in (empty, informed[kind]))
        print(f"| {kind} | {len(empty)} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
