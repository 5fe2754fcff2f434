"""Where videos are: a folder, a bucket, a pattern of names, or a manifest that lists them."""

import contextlib
import csv
import io
import json
import os
import pathlib
import posixpath
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging

from vop_jax.data.datasets.parsing import read_parquet
from vop_jax.errors import UserError
from vop_jax.search.scan import Scan, VideoFile, find_videos
from vop_jax.storage import remote
from vop_jax.storage.files import is_remote
from vop_jax.video.files import VIDEOS

MANIFESTS = (".csv", ".jsonl", ".parquet")
COLUMN = "video"  # of a manifest
WILD = "*?["
REQUESTS = 32  # at once, about the files of a manifest


def absolute(source: str) -> str:
    """A source as an index keeps it, valid in any working directory."""
    return source if is_remote(source) else os.path.abspath(source)


def is_plain(source: str) -> bool:
    """Whether a source is a folder on a disk."""
    return not (is_remote(source) or _is_manifest(source) or _is_pattern(source))


def _is_manifest(source: str) -> bool:
    return source.lower().endswith(MANIFESTS)


def _is_pattern(source: str) -> bool:
    return any(c in source for c in WILD) and not os.path.isdir(source)


def root_of(source: str) -> str:
    """The folder that paths of a source are relative to."""
    if _is_manifest(source):
        return posixpath.dirname(source)
    if _is_pattern(source):
        first = min(source.find(c) for c in WILD if c in source)
        return source[: source.rfind("/", 0, first)]
    return source.rstrip("/") or source


def locate(source: str, path: str) -> str:
    """A file of a source: a path on this machine, or an address."""
    if is_remote(path) or os.path.isabs(path):
        return path
    return f"{root_of(source)}/{path}"


def as_path(where: str) -> pathlib.Path | str:
    """A place that `locate` gave: a path, or the text of an address."""
    return where if is_remote(where) else pathlib.Path(where)


def split(source: str, path: str) -> tuple[str, str]:
    """(folder, path in it) of a file on this machine, which must not lead out of the folder."""
    return os.path.split(path) if os.path.isabs(path) else (root_of(os.fspath(source)), path)


def find(source: str, indexed: Container[str] = ()) -> Scan:
    """All videos of a source.

    Args:
        indexed: paths that are videos without being opened.

    Raises:
        UserError: there is no such source, or no video in it; a manifest has another form.
    """
    if _is_manifest(source):
        return _of_manifest(source)
    if is_plain(source):
        return find_videos(source, indexed)
    if source.startswith(("http://", "https://")):
        raise UserError(
            f"{source}: a web server lists no folders; name its videos in a manifest, a file "
            f"that ends with {' '.join(MANIFESTS)}"
        )
    logging.info("lists %s", source)
    with _store_errors(source):
        system, inside = remote.file_system(source)
        _, root = remote.file_system(root_of(source))
        pattern = _is_pattern(source)
        call = (lambda: system.glob(inside, detail=True)) if pattern else None
        listed = remote.tried(call or (lambda: system.find(inside, detail=True)))
    files = []
    for name, info in listed.items():
        path = name[len(root.rstrip("/")) + 1 :]
        hidden = any(part.startswith(".") for part in path.split("/"))
        if info.get("type") == "file" and path.lower().endswith(VIDEOS) and not hidden:
            with _store_errors(name):
                files.append(_file(path, locate(source, path), info))
    if not files:
        raise UserError(f"{source}: no videos there; their names end with {' '.join(VIDEOS)}")
    return Scan(sorted(files, key=lambda file: file.path), {})


@contextlib.contextmanager
def _store_errors(source: str) -> Iterator[None]:
    """Turns the failure of a store into one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{source}: no such folder or file") from None
    except (OSError, NotImplementedError, UserError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None


def _file(path: str, address: str, info: dict[str, Any]) -> VideoFile:
    """Of an entry of a listing."""
    if is_remote(address):
        known = remote.of_listing(address, info)
        return VideoFile(path, known.size, known.mtime)
    state = os.stat(address)
    return VideoFile(path, state.st_size, state.st_mtime_ns)


def _of_manifest(source: str) -> Scan:
    """The videos that a manifest names, each once.

    Raises:
        UserError: it cannot be read, has no column `video`, or names a video twice.
    """
    lines: dict[str, int] = {}
    for number, row in enumerate(_rows(source), 2 if source.lower().endswith(".csv") else 1):
        path = row.get(COLUMN)
        if not isinstance(path, str) or not path:
            raise UserError(f"{source}:{number}: no {COLUMN}; each row names one")
        if path in lines:
            raise UserError(f"{source}:{number}: {path} is listed twice, first in {lines[path]}")
        lines[path] = number
    if not lines:
        raise UserError(f"{source}: names no videos")

    def state(path: str) -> VideoFile:
        address = locate(source, path)
        try:
            if is_remote(address):
                known = remote.describe(address)
                return VideoFile(path, known.size, known.mtime)
            found = os.stat(address)
            return VideoFile(path, found.st_size, found.st_mtime_ns)
        except OSError:
            return VideoFile(path, 0, 0)  # decoding finds the reason

    with ThreadPoolExecutor(REQUESTS) as pool:
        return Scan(sorted(pool.map(state, lines), key=lambda file: file.path), {})


def _rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a manifest."""
    with _store_errors(source):
        if is_remote(source):
            with remote.open_file(source) as file:
                data = file.read()
        else:
            with open(source, "rb") as local:
                data = local.read()
    if source.lower().endswith(".parquet"):
        yield from read_parquet(source, data)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source}: not text in UTF-8") from None
    if source.lower().endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text))
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{source}:{number}: not a JSON object")
        yield row
