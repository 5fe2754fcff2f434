"""LSMDC: clips of films, one sentence each."""

import re
from collections.abc import Iterator

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import AnnotationFiles
from vop_jax.data.datasets.source import Benchmark, SplitSize
from vop_jax.errors import UserError

FILES = {
    "train": ("LSMDC16_annos_training.csv",),
    "val": ("LSMDC16_annos_val.csv",),
    "test": ("LSMDC16_challenge_1000_publictect.csv",),
}
CELLS = 6  # clip id, start, end of the file, start, end of the sentence, sentence
TIMES = re.compile(r"_\d\d\.\d\d\.\d\d\.\d\d\d-\d\d\.\d\d\.\d\d\.\d\d\d$")


def read_split(files: AnnotationFiles, split: str) -> list[VideoClip]:
    """Clips of a split, in a folder for each film."""
    path = files.find(FILES[split])
    captions = files.captions_of_rows(path, _rows(files, path))
    return files.clips((path, list(captions)), (path, captions), _video)


def _video(name: str) -> str:
    return f"{TIMES.sub('', name)}/{name}.avi"


def _rows(files: AnnotationFiles, path: epath.Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line number, (id, sentence)); quotes have no meaning in these files."""
    for line, row in files.read_lines(path, fallback="cp1252"):
        cells = row.split("\t")
        if len(cells) != CELLS:
            raise UserError(f"{path}:{line}: {len(cells)} cells between tabs, {CELLS} are needed")
        name = cells[0].strip()
        if not TIMES.search(name):
            raise UserError(
                f"{path}:{line}: clip {name[:80]!r}; an id <film>_HH.MM.SS.mmm-HH.MM.SS.mmm "
                "is needed"
            )
        yield line, (name, cells[-1])


DATASET = Benchmark(
    "lsmdc",
    "LSMDC, test of 1,000 clips",
    {
        # The usual list; releases differ by some clips (the paper speaks of 109,673).
        "train": SplitSize(101_079, 101_079, tolerance=0.005),
        "val": SplitSize(7408, 7408),
        "test": SplitSize(1000, 1000),
    },
    FILES,
    read_split,
)
