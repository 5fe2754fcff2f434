"""Folders, on a disk or in a bucket."""

import os
import posixpath
from collections.abc import Iterator

from etils import epath


def walk(root: str | os.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
    """(relative path, names of folders, names of files) of a folder and of all below it.

    The root's own path is "". Folders are gone through in the order of their names, those that
    the caller takes out of the list are not; links are followed, but no folder is met twice.
    """
    top = epath.Path(root)
    remote = "://" in os.fspath(root)
    seen = set()  # links may lead in circles
    for folder, folders, files in top.walk() if remote else os.walk(top, followlinks=True):
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


def _in_bucket(path: str | os.PathLike) -> str:
    """Without gs://, which etils leaves out of what it finds."""
    return os.fspath(path).rpartition("://")[2]
