"""Files and folders that are whole or not there."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Writes `path` whole or not at all.

    On a disk to a temporary file beside it, which is renamed then; in an object store, where a
    rename is a copy, an object appears when all of it is there.
    """
    target = epath.Path(path)
    if "://" in os.fspath(path):
        target.write_bytes(data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Where to write the file or folder that is to be `path`.

    At the end it takes the place of what is there; after an exception nothing has changed. In an
    object store, which renames no folders, the files appear one after the other.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):
        with tempfile.TemporaryDirectory() as scratch:
            made = pathlib.Path(scratch) / target.name
            yield made
            _upload(made, target)
        return
    place = pathlib.Path(target.parent) / f".{target.name}.partial"
    made, kept = place / target.name, place / "replaced"
    if kept.exists() and not target.exists():  # killed between the renames below
        kept.rename(target)
    shutil.rmtree(place, ignore_errors=True)  # a kill's
    place.unlink(missing_ok=True)  # and an older version's
    place.mkdir()
    try:
        yield made
        try:
            if target.is_dir():  # no folder can be renamed over another
                target.rename(kept)
            made.replace(target)
        except BaseException:
            if kept.exists() and not target.exists():
                kept.rename(target)
            raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _upload(made: pathlib.Path, target: epath.Path) -> None:
    if target.is_dir():
        target.rmtree()
    for file in sorted(made.rglob("*")) if made.is_dir() else [made]:
        if file.is_file():
            copy = target / file.relative_to(made) if made.is_dir() else target
            copy.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(copy, overwrite=True)
