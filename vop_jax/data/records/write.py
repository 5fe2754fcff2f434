"""Records are made, or completed, beside what is there, and take its place when they are whole."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence

import filelock
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from vop_jax.data.clips import Dataset, VideoClip
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.layout import (
    SHARDS,
    VERSION,
    fingerprint,
    index_name,
    read_index,
    reopen,
    staging_of,
)
from vop_jax.data.records.read import Packed, differences, find_records, older_rule, open_records
from vop_jax.data.records.shards import has_changed
from vop_jax.data.records.tfds_builder import Making, builder_class
from vop_jax.errors import UserError

OLD = f"{VERSION}.old"  # records that are being replaced
DONE = "done"  # beside shards whose dataset is whole: they are needed no more once it is in place


def pack(
    dataset: Dataset,
    directory: str | os.PathLike,
    preprocessing: Preprocessing,
    *,
    name: str = "folder",
    max_skipped: float = 0.05,
    making: Making | None = None,
    retry: bool = False,
    wait: bool = True,
    download_config: tfds.download.DownloadConfig | None = None,
) -> Packed:
    """Decodes all clips into `directory`, unless it holds exactly these already; opens them.

    A clip that cannot be used is left out, with its reason on record. The records appear whole
    or not at all; an attempt that was cut off is continued. Splits that finished records lack
    are added to them.

    Args:
        name: of the builder.
        max_skipped: share of a split's clips that may be left out.
        retry: also try clips again that finished records left out, and whose files have changed.
        wait: for another process that is making these records, or else refuse.
        download_config: of `tfds`, with what an Apache Beam runner needs.

    Raises:
        UserError: the folder holds records of other clips or made in another way, or more
            clips of a split had to be left out than `max_skipped` allows; it is in a bucket,
            where records are read but not made.
        OSError: the disk is full; finished shards are kept for the next attempt.
    """
    root = epath.Path(directory)
    if _to_do(root, dataset, preprocessing, name, retry):
        check_local(root)
        with locked(root, wait):
            _mend(root)
            if _to_do(root, dataset, preprocessing, name, retry):
                _make(dataset, root, preprocessing, name, making or Making(), download_config)
    return open_records(
        root,
        preprocessing,
        list(dataset),
        name=name,
        max_skipped=max_skipped,
        clips={split: fingerprint(clips) for split, clips in dataset.items()},
    )


def _to_do(
    root: epath.Path, dataset: Dataset, preprocessing: Preprocessing, name: str, retry: bool
) -> bool:
    """Whether there is anything to be made; not where records will be refused."""
    records = find_records(root)
    if records is None:
        return True
    made = json.loads((records / "metadata.json").read_text())
    if records.parent.name != name or any(differences(made["preprocessing"], preprocessing)):
        return False
    if any(made["clips"].get(s, fingerprint(c)) != fingerprint(c) for s, c in dataset.items()):
        return False
    return any(
        split not in made["clips"] or (retry and _has_more(records, split, clips))
        for split, clips in dataset.items()
    )


def _has_more(records: epath.Path, split: str, clips: Sequence[VideoClip]) -> bool:
    """Whether a clip that was left out may be usable now."""
    rows = read_index(records, split)
    if len(rows) != len(clips):
        raise UserError(f"{records / index_name(split)}: damaged; copy the records again")
    return any(map(has_changed, clips, rows))


def _make(
    dataset: Dataset,
    root: epath.Path,
    preprocessing: Preprocessing,
    name: str,
    making: Making,
    download_config: tfds.download.DownloadConfig | None,
) -> None:
    """Makes the missing shards, builds the dataset of all, and only then lets the old one go."""
    records, staging = find_records(root), staging_of(root, name)
    if records is not None:
        made = json.loads((records / "metadata.json").read_text())
        if older := older_rule(made["preprocessing"], preprocessing):
            raise UserError(f"{root}: cannot be added to: {older}, or use another folder")
    (staging / DONE).unlink(missing_ok=True)
    if records is not None:
        dataset = {**reopen(records, staging), **dataset}
        per_shard = json.loads((records / SHARDS).read_text())["clips_per_shard"]
        making = dataclasses.replace(making, clips_per_shard=per_shard)
    area = staging / "dataset"
    if area.exists():
        area.rmtree()
    tfds.disable_progress_bar()
    builder = builder_class(name)(
        dataset=dataset,
        preprocessing=preprocessing,
        making=making,
        staging=staging,
        data_dir=os.fspath(area),
    )
    with contextlib.redirect_stdout(None):  # it would speak of downloading
        builder.download_and_prepare(
            download_dir=os.fspath(area / "downloads"), download_config=download_config
        )
    (staging / DONE).touch()
    finished, old = root / name / VERSION, root / name / OLD
    if finished.exists():
        finished.rename(old)
    (area / name / VERSION).rename(finished)
    _mend(root)
    logging.info("%s: %d clips left out", root, len(builder.info.metadata["skipped"]))


def _mend(root: epath.Path) -> None:
    """Ends a replacement that was cut off, and removes what is needed no more."""
    for old in root.glob(f"*/{OLD}"):
        if (old.parent / VERSION).exists():
            old.rmtree()
        else:
            old.rename(old.parent / VERSION)
    for done in root.glob(f"*/{VERSION}.shards/{DONE}"):
        staging = done.parent
        if (staging.parent / VERSION).exists() and not any(staging.glob(f"dataset/*/{VERSION}")):
            staging.rmtree()


def check_local(root: str | os.PathLike) -> None:
    """Raises UserError where no records can be made."""
    if "://" not in os.fspath(root):
        return
    there = find_records(root)
    lack = "there are no records" if there is None else "these records lack some that are asked for"
    raise UserError(
        f"{os.fspath(root)}: {lack}, and they are made on a disk only; use a --workdir there, or "
        "set config.data.records to a folder there or to a copy of finished records in a bucket"
    )


@contextlib.contextmanager
def locked(root: epath.Path, wait: bool) -> Iterator[None]:
    """One process at a time makes the records of a folder."""
    lock = filelock.FileLock(root / ".lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        why = f"not a folder to write records in ({error.strerror})"
        raise UserError(f"{os.fspath(root)}: {why}") from None
    except filelock.Timeout:
        if not wait:
            raise UserError(f"{root}: another process is making these records") from None
        logging.info("%s: waiting for another process that makes these records", root)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
