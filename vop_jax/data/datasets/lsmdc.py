"""LSMDC: clips of films, one sentence each."""

import re

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import (
    Benchmark,
    Captions,
    Size,
    caption,
    clips_of,
    find,
    identifier,
    read_lines,
    unique,
)
from vop_jax.errors import UserError

FILES = {
    "train": ("LSMDC16_annos_training.csv",),
    "val": ("LSMDC16_annos_val.csv",),
    "test": ("LSMDC16_challenge_1000_publictect.csv",),
}
# clip id, start, end (as cut), start, end (as aligned), sentence
CELLS = 6
TIMES = re.compile(r"_\d\d\.\d\d\.\d\d\.\d\d\d-\d\d\.\d\d\.\d\d\.\d\d\d$")


def read(folder: epath.Path, split: str) -> tuple[list[VideoClip], list[str]]:
    """Clips of a split; quotes have no meaning in these files.

    Raises:
        UserError: the file is missing or not as published.
    """
    notes: list[str] = []
    path = find(folder, FILES[split])
    captions: Captions = {}
    lines = []
    for line, row in read_lines(path, notes, fallback="cp1252"):
        where = f"{path}:{line}"
        cells = row.split("\t")
        if len(cells) != CELLS:
            raise UserError(f"{where}: {len(cells)} cells between tabs, {CELLS} are needed")
        name = identifier(where, cells[0])
        if not TIMES.search(name):
            raise UserError(
                f"{where}: clip {name[:80]!r}; an id <film>_HH.MM.SS.mmm-HH.MM.SS.mmm is needed"
            )
        lines.append((line, name))
        captions.setdefault(name, []).append(caption(where, cells[-1]))
    unique(path, lines, notes)
    return clips_of((path, list(captions)), (path, captions), _video, notes), notes


def _video(name: str) -> str:
    return f"{TIMES.sub('', name)}/{name}.avi"


LSMDC = Benchmark(
    "lsmdc",
    "LSMDC, test of 1,000 clips",
    FILES,
    {
        # The usual list; releases differ by some clips (the paper speaks of 109,673).
        "train": Size(101_079, 101_079, tolerance=0.005),
        "val": Size(7408, 7408),
        "test": Size(1000, 1000),
    },
    read,
)
