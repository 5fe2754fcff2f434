"""The base classes of datasets: of all kinds, and of those with official files."""

import abc
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from etils import epath

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.datasets.locate import locate
from vop_jax.data.datasets.parsing import AnnotationFiles
from vop_jax.errors import UserError

ALLOWING = "config.data.official_sizes=False (prepare: --other_sizes) allows it"


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """The published size of a split; None where it is not known.

    Attributes:
        tolerance: share by which the published counts differ among themselves.
    """

    videos: int | None = None
    captions: int | None = None
    tolerance: float = 0.0

    def difference(self, split: str, videos: int, captions: int) -> str:
        """How a split's size differs from this one; "" if it does not."""
        sizes = (videos, self.videos, "videos"), (captions, self.captions, "captions")
        for actual, published, what in sizes:
            if published is not None and abs(actual - published) > self.tolerance * published:
                about = "about " if self.tolerance else ""
                return f"{split} has {actual:,} {what}, {about}{published:,} are expected"
        return ""


class Source(abc.ABC):
    """A dataset that `config.data.kind` names.

    Attributes:
        kind: the name; also that of its file in `data/datasets/`.
        protocol: what is trained on and tested on, in words; "" where the user decides.
        sizes: the published size of each split; {} where the user decides.
        rendered: whether it writes its own videos and needs no annotations.
    """

    kind: str
    protocol: str
    sizes: Mapping[str, SplitSize]
    rendered: bool = False

    @property
    def records_name(self) -> str:
        """The name of the `tfds` dataset that its records are."""
        return self.kind

    @abc.abstractmethod
    def read(
        self,
        annotations: str | os.PathLike,
        videos: str | os.PathLike | None,
        *,
        splits: Collection[str] | None = None,
        official_sizes: bool = True,
    ) -> tuple[Dataset, list[str]]:
        """Reads the clips of a dataset.

        Args:
            annotations: their file or folder.
            videos: the folder of the videos; None: they are not needed, and not looked up.
            splits: which to read; None: all.
            official_sizes: raise for sizes that differ from the published ones; else note them.

        Returns:
            Clips by split.
            Notes: what was repeated, unknown, missing or left out, one line each.

        Raises:
            UserError: a file is missing or not as documented, or a split is unknown.
        """

    def locations(self, data: Any, workdir: str) -> tuple[str, str]:
        """(annotations, videos) of a run, "" where the config names none.

        Args:
            data: the config's section `data`.
            workdir: where a rendered dataset writes its files.
        """
        return data.annotations, data.videos

    def contrasts(self, caption: str) -> dict[str, str]:
        """{what is changed: the caption with that changed}; {} without such contrasts."""
        return {}

    def check_sizes(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """Raises UserError if {split: (videos, captions)} differ from the published sizes."""
        for split, (videos, captions) in counts.items():
            size = self.sizes.get(split, SplitSize())
            if difference := size.difference(f"{self.kind} {split}", videos, captions):
                raise UserError(f"{difference}; {ALLOWING}")


@dataclasses.dataclass(frozen=True)
class Benchmark(Source):
    """A dataset with official files and sizes.

    Attributes:
        files: split -> accepted names of the file that lists its videos.
        read_split: (files, split) -> clips with official paths, relative to the folder of videos.
    """

    kind: str
    protocol: str
    sizes: Mapping[str, SplitSize]
    files: Mapping[str, tuple[str, ...]]
    read_split: Callable[[AnnotationFiles, str], list[VideoClip]]

    def read(
        self,
        annotations: str | os.PathLike,
        videos: str | os.PathLike | None,
        *,
        splits: Collection[str] | None = None,
        official_sizes: bool = True,
    ) -> tuple[Dataset, list[str]]:
        """See `Source.read`. Files of splits that are not read need not exist."""
        for split in splits or ():
            if split not in self.sizes:
                names = ", ".join(self.sizes)
                raise UserError(f"{self.kind} has no split {split!r}; there are {names}")
        folder = epath.Path(annotations)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of annotations")
        dataset: Dataset = {}
        notes: list[str] = []
        for split in self.sizes:
            if splits is None or split in splits:
                files = AnnotationFiles(folder)
                dataset[split] = self.read_split(files, split)
                notes += files.notes + self._check_split(files, split, dataset, official_sizes)
        if videos is not None:
            clips, more = locate([clip for own in dataset.values() for clip in own], videos)
            remaining = iter(clips)
            dataset = {split: [next(remaining) for _ in own] for split, own in dataset.items()}
            notes += more
        return dataset, list(dict.fromkeys(notes))

    def _check_split(
        self, files: AnnotationFiles, split: str, dataset: Dataset, official_sizes: bool
    ) -> list[str]:
        """Compares a split with its published size and with the splits before it.

        Returns:
            A note if the size differs and may differ; earlier notes explain an error.
        """
        clips, path = dataset[split], files.find(self.files[split])
        reasons = "".join(f"; {note}" for note in files.notes)
        if not clips:
            raise UserError(f"{path}: no video with captions for {self.kind} {split}{reasons}")
        captions = sum(len(clip.captions) for clip in clips)
        difference = self.sizes[split].difference(f"{self.kind} {split}", len(clips), captions)
        if difference and official_sizes:
            raise UserError(f"{path}: {difference}; {ALLOWING}{reasons}")
        # A video in both training and test makes results look better than they are.
        for other, others in dataset.items():
            ids = {clip.id for clip in others if other != split}
            if shared := [clip.id for clip in clips if clip.id in ids]:
                raise UserError(
                    f"{path}: {len(shared)} videos, first {shared[0]}, are also in "
                    f"{files.find(self.files[other]).name}; the splits of {self.kind} share none"
                )
        return [f"{path.name}: {difference}"] if difference else []
