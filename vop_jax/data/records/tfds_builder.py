"""`tfds` builders: one per dataset over one core, on one machine or on an Apache Beam runner.

Needs no TensorFlow.
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
        dataset: the clips.
        preprocessing: how they are stored.
        making: how that is done.
        staging: where finished shards wait for the others; None: beside the dataset, until it
            is whole.
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        *,
        dataset: Dataset,
        preprocessing: Preprocessing | None = None,
        making: Making | None = None,
        staging: epath.Path | None = None,
        **tfds_arguments: Any,
    ):
        self._dataset, self._making = dataset, making or Making()
        self._given_staging = staging
        self._preprocessing = preprocessing or Preprocessing()
        super().__init__(file_format="array_record", **tfds_arguments)

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


def builder_class(name: str) -> type[VideoBuilder]:
    """The builder of the dataset of records of that name."""
    return type(name, (VideoBuilder,), {"name": name}, skip_registration=True)
