"""DiDeMo: all descriptions of a video's first half minute, as one paragraph."""

import pathlib

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import (
    Benchmark,
    Captions,
    Size,
    caption,
    expect,
    find,
    identifier,
    member,
    note_ids,
    read_json,
    read_list,
    without_empty,
)

# Videos are cut to this many seconds: what the annotators saw.
SECONDS = 30.0
FILES = {
    split: (f"didemo_{split}_list.txt", f"{split}_list.txt") for split in ("train", "val", "test")
}


def read(folder: epath.Path, split: str) -> tuple[list[VideoClip], list[str]]:
    """Clips of a split, one paragraph each: the descriptions joined in file order.

    Raises:
        UserError: a file is missing or not as published.
    """
    notes: list[str] = []
    path = find(folder, FILES[split])
    described = find(folder, (f"didemo_{split}_data.json", f"{split}_data.json"))
    names = read_list(path, notes)
    by_name, by_stem = _descriptions(described, notes)
    clips: dict[str, VideoClip] = {}
    missing, twice = [], []
    for name in names:
        stem = pathlib.PurePath(name).stem
        # The lists and the captions were published with different extensions of some videos.
        sentences = by_name.get(name) or by_stem.get(stem)
        if stem in clips:
            twice.append(name)
        elif sentences:
            clips[stem] = VideoClip(stem, name, (" ".join(sentences),), None, SECONDS)
        else:
            missing.append(name)
    note_ids(path, missing, f"without a description in {described.name}, left out", notes)
    note_ids(path, twice, "under a second extension, left out", notes)
    return list(clips.values()), notes


def _descriptions(path: epath.Path, notes: list[str]) -> tuple[Captions, Captions]:
    """Descriptions by file name, and by file name without extension."""
    by_name: Captions = {}
    value = read_json(path, notes)
    for i, entry in enumerate(expect(str(path), value, list)):
        where = f"{path}: [{i}]"
        name = identifier(where, member(where, entry, "video", str))
        by_name.setdefault(name, []).append(
            caption(where, member(where, entry, "description", str))
        )
    by_name = without_empty(path, by_name, notes)
    by_stem: Captions = {}
    for name, own in by_name.items():
        by_stem.setdefault(pathlib.PurePath(name).stem, []).extend(own)
    return by_name, by_stem


DIDEMO = Benchmark(
    "didemo",
    "DiDeMo, paragraphs, test",
    FILES,
    {
        # Published counts of the training set differ by some videos lost since.
        "train": Size(8395, 8395, tolerance=0.005),
        "val": Size(1065, 1065),
        "test": Size(1004, 1004),
    },
    read,
)
