"""VATEX: the lists that text-video retrieval uses; their sizes are not asserted."""

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.msvd import captions_by_id
from vop_jax.data.datasets.parsing import Benchmark, Size, clips_of, find, read_json, read_list

FILES = {split: (f"vatex_{split}_list.txt", f"{split}_list.txt") for split in ("train", "test")}
CAPTIONS = ("ref_captions.json",)


def read(folder: epath.Path, split: str) -> tuple[list[VideoClip], list[str]]:
    """Clips of a split with all their captions.

    Raises:
        UserError: a file is missing or not as published.
    """
    notes: list[str] = []
    path = find(folder, FILES[split])
    described = find(folder, CAPTIONS)
    ids = read_list(path, notes)
    captions = captions_by_id(described, read_json(described, notes))
    return clips_of((path, ids), (described, captions), lambda name: f"{name}.mp4", notes), notes


VATEX = Benchmark(
    "vatex",
    "VATEX, test with all captions",
    FILES,
    # Lists in use differ in which videos were still to be had.
    {"train": Size(), "test": Size()},
    read,
)
