"""DiDeMo: all descriptions of a video's first half minute, as one paragraph."""

import pathlib

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import AnnotationFiles, Captions, captions_of_entries, expect
from vop_jax.data.datasets.source import Benchmark, SplitSize

SECONDS = 30.0  # of each video; the annotators saw no more
FILES = {
    split: (f"didemo_{split}_list.txt", f"{split}_list.txt") for split in ("train", "val", "test")
}


def read_split(files: AnnotationFiles, split: str) -> list[VideoClip]:
    """Clips of a split, one paragraph each: the descriptions joined in file order."""
    list_file = files.find(FILES[split])
    described = files.find((f"didemo_{split}_data.json", f"{split}_data.json"))
    names = files.read_list(list_file)
    entries = expect(str(described), files.read_json(described), list)
    by_name = files.without_empty(
        described, captions_of_entries(f"{described}: ", entries, "video", "description")
    )
    by_stem: Captions = {}
    for name, own in by_name.items():
        by_stem.setdefault(pathlib.PurePath(name).stem, []).extend(own)
    clips: dict[str, VideoClip] = {}
    missing, repeated = [], []
    for name in names:
        stem = pathlib.PurePath(name).stem
        # The lists and the captions were published with different extensions of some videos.
        sentences = by_name.get(name) or by_stem.get(stem)
        if stem in clips:
            repeated.append(name)
        elif sentences:
            clips[stem] = VideoClip(stem, name, (" ".join(sentences),), None, SECONDS)
        else:
            missing.append(name)
    files.note_ids(list_file, missing, f"without a description in {described.name}, left out")
    files.note_ids(list_file, repeated, "under a second extension, left out")
    return list(clips.values())


DATASET = Benchmark(
    "didemo",
    "DiDeMo, paragraphs, test",
    {
        # Published counts of the training set differ by some videos lost since.
        "train": SplitSize(8395, 8395, tolerance=0.005),
        "val": SplitSize(1065, 1065),
        "test": SplitSize(1004, 1004),
    },
    FILES,
    read_split,
)
