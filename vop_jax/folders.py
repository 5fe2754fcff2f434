"""Folders, on a disk or in a bucket."""

import os
import posixpath
from collections.abc import Callable, Iterator

from etils import epath

from vop_jax.errors import UserError


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
