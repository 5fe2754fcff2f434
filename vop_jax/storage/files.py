"""Files on a disk or in an object store: atomic writes, walks, locks, copies, hashes."""

import errno
import hashlib
import json
import os
import pathlib
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import filelock
from absl import logging
from etils import epath

from vop_jax.errors import UserError

StrPath = str | os.PathLike[str]


def is_remote(path: StrPath) -> bool:
    """Whether a path is in an object store, such as gs://bucket/file."""
    return "://" in os.fspath(path)


def write_atomic(path: StrPath, data: bytes) -> None:
    """Writes a file completely or not at all; creates its folder."""
    if is_remote(path):  # an object appears when all of it is uploaded
        epath.Path(path).write_bytes(data)
        return
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: StrPath, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def replacing(path: StrPath) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write a file or a folder to, which then becomes `path`.

    It replaces what `path` was; after an exception `path` is unchanged. An object store cannot
    rename a folder, so there the files of a folder appear one after the other.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            partial = pathlib.Path(scratch) / target.name
            yield partial
            _upload(partial, target)
        return
    scratch_folder = pathlib.Path(target.parent) / f".{target.name}.partial"
    partial, replaced = scratch_folder / target.name, scratch_folder / "replaced"
    if replaced.exists() and not target.exists():  # a process was killed between the two renames
        replaced.rename(target)
    shutil.rmtree(scratch_folder, ignore_errors=True)  # a killed process leaves it
    scratch_folder.unlink(missing_ok=True)  # an older version of this package left a file
    scratch_folder.mkdir()
    try:
        yield partial
        try:
            if target.is_dir():  # a folder cannot be renamed over another one
                target.rename(replaced)
            partial.replace(target)
        except BaseException:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(scratch_folder, ignore_errors=True)


def _upload(source: pathlib.Path, target: epath.Path) -> None:
    if target.is_dir():
        target.rmtree()
    for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if file.is_file():
            copy = target / file.relative_to(source) if source.is_dir() else target
            copy.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(copy, overwrite=True)


@contextmanager
def local_copy(path: StrPath, kind: str = "a file") -> Iterator[str]:
    """Yields a path on this machine: `path` itself, or a temporary copy of a remote file.

    Args:
        kind: the expected kind of file, for the message about a directory.

    Raises:
        UserError: there is no such file, or it is a directory or cannot be opened.
    """
    source = epath.Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such file")
    if source.is_dir():
        raise UserError(f"{path}: is a directory, not {kind}")
    if not is_remote(path):
        try:  # safetensors calls a file that it may not open a missing one
            open(path, "rb").close()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = os.path.join(scratch, source.name)
        source.copy(copy)
        yield copy


@contextmanager
def folder_lock(
    folder: StrPath, busy: str, *, label: str = "", use: str = "write in", wait: bool = False
) -> Iterator[None]:
    """Creates a folder and keeps other processes out of it; the lock ends with the process.

    Args:
        busy: says who holds the lock, such as "another run is using it".
        label: how messages name the folder, such as "--workdir=DIR".
        use: what the folder is for, in the message about a path that cannot be one.
        wait: waits for the other process instead of raising.

    Raises:
        UserError: another process holds the lock, or `folder` cannot be created.
        OSError: the disk is full.
    """
    label, lock = label or os.fspath(folder), filelock.FileLock(os.path.join(folder, ".lock"))
    try:
        os.makedirs(folder, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise UserError(f"{label}: {busy}") from None
        logging.info("%s: %s; waiting for it", label, busy)
        lock.acquire()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{label}: not a folder to {use} ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def sha256(path: StrPath) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk(
    root: StrPath, *, links: bool = True, unlisted: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields (relative path, folder names, file names) of a folder and of each folder below it.

    The relative path of the root is "". Folders come in the order of their names; those that the
    caller removes from the list of names are not entered.

    Args:
        links: whether to follow links to folders; no folder is visited twice.
        unlisted: receives the error of each folder on a disk that cannot be listed; None ignores
            such folders.
    """
    remote, visited = is_remote(root), set()  # links may form circles
    top = epath.Path(root)
    tree = _walk_store(top) if remote else os.walk(top, onerror=unlisted, followlinks=links)
    for folder, folders, names in tree:
        identity = _without_scheme(folder) if remote else os.path.realpath(folder)
        if identity in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders.sort()
        if remote:
            relative = posixpath.relpath(identity, _without_scheme(top))
        else:
            relative = os.path.relpath(folder, top).replace(os.sep, "/")
        yield "" if relative == "." else relative, folders, names


def _walk_store(root: epath.Path) -> Iterator[tuple[epath.Path, list[str], list[str]]]:
    try:
        yield from root.walk()
    except ImportError as error:
        raise UserError(f"{root}: {error}; pip install -e '.[gcs]'") from None


def _without_scheme(path: StrPath) -> str:
    """A path without gs://, which etils omits from the folders that it lists."""
    return os.fspath(path).rpartition("://")[2]
