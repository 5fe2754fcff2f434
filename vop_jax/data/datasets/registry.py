"""The benchmarks by name, and what holds for all: known sizes, splits that share nothing."""

import os
from collections.abc import Collection, Mapping

from etils import epath

from vop_jax.data.clips import Dataset
from vop_jax.data.datasets.activitynet import ACTIVITYNET
from vop_jax.data.datasets.didemo import DIDEMO
from vop_jax.data.datasets.lsmdc import LSMDC
from vop_jax.data.datasets.msrvtt import MSRVTT7K, MSRVTT9K
from vop_jax.data.datasets.msvd import MSVD
from vop_jax.data.datasets.parsing import Benchmark, find
from vop_jax.data.datasets.vatex import VATEX
from vop_jax.errors import UserError

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (MSRVTT9K, MSRVTT7K, DIDEMO, ACTIVITYNET, LSMDC, MSVD, VATEX)
}

ALLOWING = "config.data.official_sizes=False (prepare: --other_sizes) allows it"


def read_benchmark(
    name: str,
    annotations: str | os.PathLike,
    *,
    splits: Collection[str] | None = None,
    official_sizes: bool = True,
) -> tuple[Dataset, list[str]]:
    """Reads a benchmark from its official files.

    Args:
        name: a key of `BENCHMARKS`.
        annotations: the folder of its annotation files.
        splits: which to read; None: all. Files of other splits need not be there.
        official_sizes: whether another number of videos or captions than the published one is
            an error, or else a note.

    Returns:
        Clips by split, their paths relative to the folder of videos; see `locate.locate`.
        Notes: what was repeated, unknown or left out, one line each.

    Raises:
        UserError: an unknown name or split, a file that is missing or not as published, a video
            in two splits, or other sizes than the published ones.
    """
    if name not in BENCHMARKS:
        raise UserError(f"{name!r}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    for split in splits or ():
        if split not in benchmark.sizes:
            there = ", ".join(benchmark.sizes)
            raise UserError(f"{name} has no split {split!r}; there are {there}")
    folder = epath.Path(annotations)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of annotations")
    dataset: Dataset = {}
    notes: list[str] = []
    for split in benchmark.sizes:
        if splits is None or split in splits:
            dataset[split], own = benchmark.read(folder, split)
            notes += own + _check_size(benchmark, folder, dataset, split, own, official_sizes)
    _check_disjoint(benchmark, folder, dataset)
    return dataset, list(dict.fromkeys(notes))


def check_sizes(name: str, counts: Mapping[str, tuple[int, int]]) -> None:
    """Compares {split: (videos, captions)} of a benchmark with the published sizes.

    Raises:
        UserError: they differ.
    """
    for split, (videos, captions) in counts.items():
        if differing := _difference(BENCHMARKS[name], split, videos, captions):
            raise UserError(f"{differing}; {ALLOWING}")


def _check_size(
    benchmark: Benchmark,
    folder: epath.Path,
    dataset: Dataset,
    split: str,
    noted: list[str],
    official_sizes: bool,
) -> list[str]:
    """A note, if the size of a split differs and may; what was noted before tells why."""
    path = find(folder, benchmark.files[split])
    clips = dataset[split]
    why = "".join(f"; {note}" for note in noted)
    if not clips:
        raise UserError(f"{path}: no video with captions for {benchmark.name} {split}{why}")
    captions = sum(len(clip.captions) for clip in clips)
    differing = _difference(benchmark, split, len(clips), captions)
    if differing and official_sizes:
        raise UserError(f"{path}: {differing}; {ALLOWING}{why}")
    return [f"{path.name}: {differing}"] if differing else []


def _difference(benchmark: Benchmark, split: str, videos: int, captions: int) -> str:
    """How the size of a split differs from the published one; "" if it does not."""
    size = benchmark.sizes[split]
    for found, expected, what in (
        (videos, size.videos, "videos"),
        (captions, size.captions, "captions"),
    ):
        if expected is not None and abs(found - expected) > size.tolerance * expected:
            about = "about " if size.tolerance else ""
            return (
                f"{benchmark.name} {split} has {found:,} {what}, {about}{expected:,} are expected"
            )
    return ""


def _check_disjoint(benchmark: Benchmark, folder: epath.Path, dataset: Dataset) -> None:
    """A video to train on and to test on makes results look better than they are."""
    owner: dict[str, str] = {}
    for split, clips in dataset.items():
        shared = [clip.id for clip in clips if owner.setdefault(clip.id, split) != split]
        if shared:
            path = find(folder, benchmark.files[split])
            other = find(folder, benchmark.files[owner[shared[0]]])
            raise UserError(
                f"{path}: {len(shared)} videos, first {shared[0]}, are also in {other.name}; "
                f"the splits of {benchmark.name} share none"
            )
