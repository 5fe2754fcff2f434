"""Files and folders that are whole or not there."""

import json
import os
import pathlib
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from vop_jax.errors import UserError


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


def walk(
    root: str | os.PathLike,
    *,
    links: bool = True,
    unlisted: Callable[[OSError], None] | None = None,
) -> Iterator[tuple[str, list[str], list[str]]]:
    """(relative path, names of folders, names of files) of a folder and of all below it.

    The root's own path is "". Folders are gone through in the order of their names, those that
    the caller takes out of the list are not.

    Args:
        links: whether those to folders are followed; no folder is met twice.
        unlisted: is given the error of each folder on a disk that cannot be listed; None: such
            folders are passed over.
    """
    top = epath.Path(root)
    remote = "://" in os.fspath(root)
    seen = set()  # links may lead in circles
    found = _in_store(top) if remote else os.walk(top, onerror=unlisted, followlinks=links)
    for folder, folders, files in found:
        place = _in_bucket(folder) if remote else os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        if remote:
            relative = posixpath.relpath(place, _in_bucket(top))
        else:
            relative = os.path.relpath(folder, top).replace(os.sep, "/")
        yield "" if relative == "." else relative, folders, files


def _in_store(root: epath.Path) -> Iterator[tuple[epath.Path, list[str], list[str]]]:
    try:
        yield from root.walk()
    except ImportError as error:
        raise UserError(f"{root}: {error}; pip install -e '.[gcs]'") from None


def _in_bucket(path: str | os.PathLike) -> str:
    """Without gs://, which etils leaves out of what it finds."""
    return os.fspath(path).rpartition("://")[2]
