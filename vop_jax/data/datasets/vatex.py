"""VATEX: the lists that text-video retrieval uses; their sizes are not checked."""

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import AnnotationFiles, captions_by_id
from vop_jax.data.datasets.source import Benchmark, SplitSize

FILES = {split: (f"vatex_{split}_list.txt", f"{split}_list.txt") for split in ("train", "test")}
CAPTIONS = ("ref_captions.json",)


def read_split(files: AnnotationFiles, split: str) -> list[VideoClip]:
    """Clips of a split with all captions."""
    path, described = files.find(FILES[split]), files.find(CAPTIONS)
    ids = files.read_list(path)
    captions = captions_by_id(described, files.read_json(described))
    return files.clips((path, ids), (described, captions), "{}.mp4".format)


DATASET = Benchmark(
    "vatex",
    "VATEX, test with all captions",
    # Lists in use differ in which videos were still available.
    {"train": SplitSize(), "test": SplitSize()},
    FILES,
    read_split,
)
