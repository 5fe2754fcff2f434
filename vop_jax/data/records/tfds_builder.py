"""`tfds` builders: one per dataset over one core, on one machine or on an Apache Beam runner.

Importing this file registers them: `tfds.builder("msrvtt9k", data_dir=…)`, with the videos and
the annotation files in the folders `videos` and `annotations` of `manual_dir`. Needs no
TensorFlow.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_builder, naming, splits
from tqdm import tqdm

from vop_jax.data.clips import Dataset
from vop_jax.data.datasets.folder import DELIMITERS, JSON_LINES, read_folder
from vop_jax.data.datasets.locate import locate
from vop_jax.data.datasets.registry import read_benchmark
from vop_jax.data.records import shards
from vop_jax.data.records.encode import Preprocessing, encode_clip
from vop_jax.data.records.layout import SHARDS, VERSION, fingerprint, index_name, link, staging_of
from vop_jax.errors import UserError
from vop_jax.storage.files import write_atomic, write_json
from vop_jax.video.workers import in_processes, in_threads

CLIPS_PER_SHARD = shards.CLIPS_PER_SHARD


@dataclasses.dataclass(frozen=True)
class Making:
    """How the work is done; nothing of it shows in the result but `clips_per_shard`.

    Attributes:
        workers: clips decoded at once; 0: as many as there are cores.
        isolated: in processes of their own, so that a decoder may crash or hang.
        seconds: that a clip may take in such a process.
        progress: show a bar.
    """

    workers: int = 0
    isolated: bool = True
    seconds: float = 300.0
    progress: bool = True
    clips_per_shard: int = CLIPS_PER_SHARD


class VideoBuilder(dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Clips with captions as records of JPEG frames.

    Args:
        dataset: the clips; None: read from `manual_dir`.
        preprocessing: how they are stored.
        making: how that is done.
        staging: where finished shards wait for the others; None: beside the dataset, until it
            is whole.
    """

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The folders `videos` and `annotations`; see docs/reproduce.md."

    def __init__(
        self,
        *,
        dataset: Dataset | None = None,
        preprocessing: Preprocessing | None = None,
        making: Making | None = None,
        staging: epath.Path | None = None,
        **tfds_arguments: Any,
    ):
        self._dataset, self._making = dataset, making or Making()
        self._given_staging = staging
        self._preprocessing = preprocessing or Preprocessing()
        super().__init__(file_format="array_record", **tfds_arguments)

    @classmethod
    def read(
        cls,
        annotations: str | os.PathLike,
        videos: str | os.PathLike | None,
        *,
        official_sizes: bool = True,
        only: Sequence[str] | None = None,
    ) -> tuple[Dataset, list[str]]:
        """The clips of the official files, their videos looked up if wanted; what was noticed.

        Raises:
            UserError: see `registry.read_benchmark` and `locate.locate`.
        """
        dataset, notes = read_benchmark(
            cls.name, annotations, splits=only, official_sizes=official_sizes
        )
        if videos is None:
            return dataset, notes
        every = [clip for clips in dataset.values() for clip in clips]
        located, more = locate(every, videos)
        at = iter(located)
        found = {split: [next(at) for _ in clips] for split, clips in dataset.items()}
        return found, [*notes, *more]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Sampled frames of video clips with captions: {self.name}.",
            features=shards.features(),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # record i is the i-th readable clip
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Makes the shards that are not there yet, then the dataset of them."""
        if self._dataset is None:
            manual = epath.Path(dl_manager.manual_dir)
            self._dataset, _ = self.read(manual / "annotations", manual / "videos")
        planned = shards.plan(
            self._dataset, self._staging(), self._preprocessing, self._making.clips_per_shard
        )
        if download_config.beam_runner or download_config.beam_options:
            self._make_with_beam(planned, download_config)
        else:
            self._make_here(planned)
        self.info.metadata.update(
            preprocessing=self._preprocessing.described(),
            clips={split: fingerprint(clips) for split, clips in self._dataset.items()},
            skipped=[],
        )
        infos, made = [], []
        for split in self._dataset:
            info, files = self._finish_split(split, [s for s in planned if s.split == split])
            infos.append(info)
            made += files
        write_json(
            self.data_path / SHARDS,
            {"clips_per_shard": self._making.clips_per_shard, "shards": made},
        )
        self.info.set_splits(splits.SplitDict(infos))

    def _staging(self) -> epath.Path:
        return self._given_staging or staging_of(epath.Path(self.data_dir_root), self.name)

    def _make_here(self, planned: list[shards.Shard]) -> None:
        making = self._making
        tasks = shards.tasks_of(planned)
        clips = [clip for task in tasks for clip in task.to_encode]
        encode = functools.partial(encode_clip, preprocessing=self._preprocessing)
        workers = making.workers or os.cpu_count() or 1
        if making.isolated and clips:
            results = in_processes(encode, clips, workers, seconds=making.seconds)
        else:
            results = in_threads(encode, clips, workers)
        total = sum(len(shard.clips) for shard in planned)
        with (
            contextlib.closing(results),
            tqdm(
                results,
                f"packing {self.name}",
                total,
                initial=total - len(clips),
                unit="clip",
                disable=not making.progress,
            ) as bar,
        ):
            found = iter(bar)
            shards.write_shards(tasks, found)
            next(found, None)  # the bar counts a clip when the next is asked for

    def _make_with_beam(self, planned: list[shards.Shard], download_config: Any) -> None:
        try:
            import apache_beam as beam
        except ImportError:
            raise UserError("Apache Beam is not installed: pip install -e '.[beam]'") from None
        options, runner = download_config.beam_options, download_config.beam_runner
        with beam.Pipeline(runner=runner, options=options) as pipeline:
            _ = (
                pipeline
                | beam.Create([task.shard for task in shards.tasks_of(planned)])
                | beam.Reshuffle()
                | beam.Map(write_alone, self._preprocessing, self._making.seconds)
            )

    def _finish_split(
        self, split: str, own: list[shards.Shard]
    ) -> tuple[splits.SplitInfo, list[dict[str, Any]]]:
        """Links a split's shards into the dataset, writes its index; raises if nothing is left."""
        notes = []
        for shard in own:
            note = shard.note()  # as it was made, even if a video has come since
            assert note is not None
            notes.append(note)
        rows = [row for note in notes for row in note["clips"]]
        kept = [sum("skipped" not in row for row in note["clips"]) for note in notes]
        skipped = [
            {"split": split, "reason": row["skipped"]}
            | {key: row[key] for key in ("id", "path", "where") if key in row}
            for row in rows
            if "skipped" in row
        ]
        self.info.metadata["skipped"] += skipped
        check_share(split, len(rows), skipped, max_skipped=1.0)
        template = naming.ShardedFileTemplate(
            data_dir=self.data_path,
            dataset_name=self.name,
            split=split,
            filetype_suffix="array_record",
        )
        files: list[str | None] = []  # shards without a usable clip have none
        for shard, count in zip(own, kept, strict=True):
            number = sum(file is not None for file in files)
            target = template.sharded_filepath(shard_index=number, num_shards=sum(map(bool, kept)))
            if count:
                link(shard.path, target)
            files.append(target.name if count else None)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.data_path / index_name(split), text.encode("utf-8", "surrogatepass"))
        made = [
            {
                "split": split,
                "file": file,
                "clips": len(note["clips"]),
                **{key: note[key] for key in ("fingerprint", "bytes", "size", "sha256")},
            }
            for file, note in zip(files, notes, strict=True)
        ]
        info = splits.SplitInfo(
            name=split,
            shard_lengths=[count for count in kept if count],
            num_bytes=sum(note["bytes"] for note in notes),
            filename_template=template,
        )
        return info, made

    def _post_download_and_prepare_hook(self) -> None:
        if self._given_staging is None:
            shutil.rmtree(self._staging(), ignore_errors=True)


def write_alone(shard: shards.Shard, preprocessing: Preprocessing, seconds: float) -> None:
    """One shard, on whatever machine this runs; nothing where it is finished by now."""
    encode = functools.partial(encode_clip, preprocessing=preprocessing)
    tasks = shards.tasks_of([shard])
    clips = [clip for task in tasks for clip in task.to_encode]
    with contextlib.closing(in_processes(encode, clips, 1, seconds=seconds)) as results:
        shards.write_shards(tasks, results)


def check_share(
    split: str, count: int, skipped: Sequence[dict[str, str]], max_skipped: float
) -> None:
    """Raises UserError if more than that share of a split, or all of it, was left out."""
    first = f"{shards.label_of(skipped[0])} ({skipped[0]['reason']})" if skipped else "it is empty"
    if len(skipped) == count:
        raise UserError(f"split {split!r}: none of {count} videos can be used: {first}")
    if len(skipped) > max_skipped * count:
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise UserError(
            f"split {split!r}: {len(skipped)} of {count} videos cannot be used, more than "
            f"config.data.max_skipped={max_skipped:g} allows: {first}{more}"
        )


class Folder(VideoBuilder):
    """A folder of videos with a CSV or JSON Lines file of captions, `annotations`."""

    name = "folder"

    @classmethod
    def read(cls, annotations, videos, *, official_sizes=True, only=None):
        """See `VideoBuilder.read` and `folder.read_folder`."""
        path = epath.Path(annotations)
        if path.is_dir():  # of a manual_dir
            files = [p for p in sorted(path.iterdir()) if p.suffix in (*DELIMITERS, *JSON_LINES)]
            if len(files) != 1:
                raise UserError(f"{path}: a folder; give the CSV or JSON Lines file of captions")
            path = files[0]
        dataset = read_folder(path, videos or path.parent)
        for split in only or ():
            if split not in dataset:
                raise UserError(f"{path}: no split {split!r}; there are {', '.join(dataset)}")
        every = [clip for clips in dataset.values() for clip in clips]
        if videos is not None and not any(shards.state_of(clip.path) for clip in every):
            first = f"{every[0].where}: {every[0].path}"
            raise UserError(f"{videos}: none of the {len(every)} videos is there; first {first}")
        return {k: v for k, v in dataset.items() if only is None or k in only}, []


class Msrvtt9k(VideoBuilder):
    """MSR-VTT: 9,000 training videos, test 1k-A."""

    name = "msrvtt9k"


class Msrvtt7k(VideoBuilder):
    """MSR-VTT: 7,010 training videos, test 1k-A."""

    name = "msrvtt7k"


class Didemo(VideoBuilder):
    """DiDeMo: paragraphs, the first 30 seconds."""

    name = "didemo"


class Activitynet(VideoBuilder):
    """ActivityNet Captions: paragraphs, whole videos, val_1 as test."""

    name = "activitynet"


class Lsmdc(VideoBuilder):
    """LSMDC: clips of movies."""

    name = "lsmdc"


class Msvd(VideoBuilder):
    """MSVD: many captions a video."""

    name = "msvd"


class Vatex(VideoBuilder):
    """VATEX: ten captions a video."""

    name = "vatex"


BUILDERS: dict[str, type[VideoBuilder]] = {
    builder.name: builder
    for builder in (Folder, Msrvtt9k, Msrvtt7k, Didemo, Activitynet, Lsmdc, Msvd, Vatex)
}


def name_of(kind: str) -> str:
    """The builder behind `config.data.kind`: rendered clips are a folder too."""
    return kind if kind in BUILDERS else Folder.name
