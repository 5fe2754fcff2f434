"""Clips decoded once into records: a `tfds` dataset of JPEG frames in array_record files.

Needs no TensorFlow. The records say how they were made, and are refused where anything else
is asked for.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from PIL import Image
from tqdm import tqdm

from vop_jax.data.frames import Frames, VideoError, read_frames
from vop_jax.data.records import Clip, Dataset
from vop_jax.errors import UserError

NAME, VERSION = "video_records", "1.0.0"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How clips are stored; the comments are in `vop_jax.config`, section `data`."""

    frames: int = 12
    stored_fps: float = 0.0
    short_side: int = 256
    jpeg_quality: int = 95
    short_clips: str = "skip"


class Split:
    """The readable clips of a split, in the order of the annotations.

    Indexing gives the stored frames of a clip as a list of JPEG bytes.

    Attributes:
        ids, captions: of each clip.
        skipped: the clips that could not be read.
    """

    def __init__(self, directory: str, name: str, clips: list[Clip], skipped: set[str]):
        kept = [clip for clip in clips if clip.id not in skipped]
        self.name = name
        self.ids = [clip.id for clip in kept]
        self.captions = [clip.captions for clip in kept]
        self.skipped = [clip for clip in clips if clip.id in skipped]
        builder = tfds.builder_from_directory(directory)
        self._source = builder.as_data_source(name, decoders={"frames": _AsStored()})
        if len(self._source) != len(kept):
            raise UserError(
                f"{directory}: split {name!r} holds {len(self._source)} records, not {len(kept)}; "
                "delete the folder to make them again"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> list[bytes]:
        return list(self._source[index]["frames"])


@dataclasses.dataclass(frozen=True)
class Packed:
    """All splits of a dataset, and of each clip that was skipped: id, path, split, reason."""

    splits: dict[str, Split]
    skipped: list[dict[str, str]]


def pack(
    dataset: Dataset,
    directory: str | os.PathLike,
    preprocessing: Preprocessing,
    *,
    max_skipped: float = 0.05,
    threads: int = 0,
    progress: bool = True,
) -> Packed:
    """Decodes all clips into `directory`, unless it holds exactly these already; opens them.

    A clip that cannot be used is left out, with its reason on record. The records appear whole
    or not at all.

    Args:
        max_skipped: share of a split's clips that may be left out.
        threads: clips decoded at the same time; 0: as many as there are cores.

    Raises:
        UserError: the folder holds records of other clips or made in another way, or more
            clips of a split had to be left out than `max_skipped` allows.
        OSError: the disk is full; nothing is left behind.
    """
    asked = {
        "preprocessing": dataclasses.asdict(preprocessing),
        "clips": {split: _fingerprint(clips) for split, clips in dataset.items()},
    }
    root = epath.Path(directory)
    records = root / NAME / VERSION
    if not records.exists():
        _build(dataset, root, preprocessing, asked, threads or os.cpu_count() or 1, progress)
    made = json.loads((records / "metadata.json").read_text())
    _check_same(root, made, asked)
    packed = Packed({}, made["skipped"])
    for split, clips in dataset.items():
        skipped = {s["id"] for s in packed.skipped if s["split"] == split}
        _check_share(split, clips, [s for s in packed.skipped if s["split"] == split], max_skipped)
        packed.splits[split] = Split(os.fspath(records), split, clips, skipped)
    return packed


def stored_frames(
    directory: str | os.PathLike, split: str, ids: Collection[str]
) -> dict[str, list[bytes]]:
    """{id: the stored frames, JPEG} of the clips of these ids that the records hold.

    Raises:
        UserError: there are no records of that split.
    """
    root = epath.Path(directory) / NAME / VERSION
    try:
        source = tfds.builder_from_directory(os.fspath(root)).as_data_source(
            split, decoders={"frames": _AsStored()}
        )
    except (OSError, ValueError, tfds.core.DatasetNotFoundError):
        raise UserError(f"{directory}: no records of split {split!r}") from None
    named = ((record["id"].decode(), record["frames"]) for record in iter(source))
    return {name: list(frames) for name, frames in named if name in ids}


class VideoRecords(tfds.core.GeneratorBasedBuilder):
    """The `tfds` builder behind `pack`; `asked` is kept in metadata.json."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(
        self,
        dataset: Dataset | None = None,
        preprocessing: Preprocessing | None = None,
        asked: dict[str, Any] | None = None,
        threads: int = 1,
        progress: bool = False,
        **tfds_arguments: Any,
    ):
        self._dataset = dataset or {}
        self._preprocessing = preprocessing or Preprocessing()
        self._metadata = {**(asked or {}), "skipped": []}
        self._threads, self._progress = threads, progress
        super().__init__(**tfds_arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "frames": tfds.features.Sequence(
                tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            ),
            "indices": tfds.features.Sequence(np.int32),
            "timestamps": tfds.features.Sequence(np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Sampled frames of video clips with captions.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,  # record i is clip i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in self._dataset}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        clips = self._dataset[split]
        decoded = _in_parallel(clips, self._preprocessing, self._threads)
        bar = tqdm(
            zip(clips, decoded, strict=True),
            total=len(clips),
            desc=f"packing {split}",
            unit="clip",
            disable=not self._progress,
        )
        for key, (clip, frames) in enumerate(bar):
            if isinstance(frames, VideoError):
                logging.warning("skipped %s: %s", clip.path, frames)
                skipped = {"id": clip.id, "path": clip.path, "split": split, "reason": str(frames)}
                self.info.metadata["skipped"].append(skipped)
                continue
            yield (
                key,
                {
                    "id": clip.id,
                    "captions": list(clip.captions),
                    "frames": [_jpeg(p, self._preprocessing.jpeg_quality) for p in frames.pixels],
                    "indices": frames.indices,
                    "timestamps": frames.timestamps,
                },
            )


class _AsStored(tfds.decode.Decoder):
    """Hands out stored bytes; JPEGs are decoded where the frames are chosen."""

    def decode_example(self, example: Any) -> Any:
        return example

    def decode_batch_example_np(self, examples: Any) -> Any:
        return examples


def _build(
    dataset: Dataset,
    root: epath.Path,
    preprocessing: Preprocessing,
    asked: dict[str, Any],
    threads: int,
    progress: bool,
) -> None:
    """Runs the builder beside the final place, and moves its result there when it is whole."""
    _remove_unfinished(root)
    tfds.disable_progress_bar()
    builder = VideoRecords(
        dataset,
        preprocessing,
        asked,
        threads,
        progress,
        data_dir=os.fspath(root),
        file_format="array_record",
    )
    try:
        with contextlib.redirect_stdout(None):  # it would speak of downloading
            builder.download_and_prepare()
    except BaseException:
        _remove_unfinished(root)
        for split, clips in dataset.items():  # `tfds` cannot write an empty split
            skipped = [s for s in builder.info.metadata["skipped"] if s["split"] == split]
            if len(skipped) == len(clips):
                _check_share(split, clips, skipped, max_skipped=1.0)
        raise


def _remove_unfinished(root: epath.Path) -> None:
    """What a kill or a full disk left of an earlier attempt."""
    for leftover in (*(root / NAME).glob("*incomplete*"), root / "downloads"):
        if leftover.exists():
            leftover.rmtree() if "://" in str(root) else shutil.rmtree(leftover, True)


def _in_parallel(
    clips: list[Clip], preprocessing: Preprocessing, threads: int
) -> Iterator[Frames | VideoError]:
    """Decodes clips in order, some ahead of the one asked for."""
    ahead = 2 * threads  # bounds the memory
    with ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[Future] = collections.deque()
        try:
            for clip in clips:
                pending.append(pool.submit(_decode, clip, preprocessing))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _decode(clip: Clip, preprocessing: Preprocessing) -> Frames | VideoError:
    try:
        frames = read_frames(
            clip.path,
            preprocessing.frames,
            start=clip.start,
            end=clip.end,
            fps=preprocessing.stored_fps,
            short_side=preprocessing.short_side,
        )
    except VideoError as error:
        return error
    count = len(set(frames.indices))
    if count < preprocessing.frames and preprocessing.short_clips == "skip":
        return VideoError(
            f"{count} frames, fewer than config.data.frames={preprocessing.frames}; "
            "config.data.short_clips='repeat' would use it"
        )
    return frames


def _jpeg(pixels: np.ndarray, quality: int) -> io.BytesIO:
    """Without chroma subsampling, which would blur small coloured things."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    file.seek(0)
    return file


def _fingerprint(clips: list[Clip]) -> str:
    """What a split asks for; paths are left out, so that a folder of videos may move."""
    rows = [[c.id, c.captions, c.start, c.end] for c in clips]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _check_same(root: epath.Path, made: dict[str, Any], asked: dict[str, Any]) -> None:
    remedy = "use another config.data.records, or delete that folder to make them again"
    for key, value in asked["preprocessing"].items():
        if made["preprocessing"].get(key) != value:
            raise UserError(
                f"{root}: records were made with data.{key}={made['preprocessing'].get(key)!r}, "
                f"not {value!r}; {remedy}"
            )
    for split, value in asked["clips"].items():
        if made["clips"].get(split) != value:
            raise UserError(
                f"{root}: records of split {split!r} were made of other clips or captions than "
                f"the annotations have now; {remedy}"
            )


def _check_share(
    split: str, clips: list[Clip], skipped: list[dict[str, str]], max_skipped: float
) -> None:
    if len(skipped) == len(clips) or len(skipped) > max_skipped * len(clips):
        first = skipped[0]
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise UserError(
            f"split {split!r}: {len(skipped)} of {len(clips)} videos cannot be used, more than "
            f"config.data.max_skipped={max_skipped:g} allows: {first['path']} "
            f"({first['reason']}){more}"
        )
