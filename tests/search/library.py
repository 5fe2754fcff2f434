"""A folder of small films and indexes of it."""

import os
import shutil
from unittest import mock

import numpy as np

from tests.search.shelf import DATE
from tests.video import videos
from vop_jax.search import catalog, updater
from vop_jax.search.build import IndexRequest, build_index
from vop_jax.search.collection.build import build_collection
from vop_jax.search.index import Index
from vop_jax.search.stores.heap import open_store
from vop_jax.search.updater import IndexOptions
from vop_jax.video.workers import in_processes, in_threads


def write_film(path, frames):
    videos.write(path, frames, rate=10, width=32, height=32)


def write_films(folder, count=4, seconds=3):
    """`a.mp4`, `sub/b.mp4`, …: each of its own length."""
    (folder / "sub").mkdir(parents=True)
    paths = []
    for i in range(count):
        name = f"{'sub/' if i % 2 else ''}{chr(ord('a') + i)}.mp4"
        write_film(folder / name, 10 * seconds + i)
        os.utime(folder / name, (DATE + 86400 * i,) * 2)
        paths.append(name)
    return paths


def make(directory, folder, retriever, captions="", options=None, processes=False, **fields):
    """Builds or updates an index of a folder; its report.

    Args:
        directory: None for an index on the server that `store` names.
        processes: decodes in processes, as users do; threads start at once.
    """
    request = IndexRequest(str(folder), captions=str(captions), **fields)
    options = IndexOptions(**{"workers": 1, "batch": 4} | (options or {}))

    def decode(call, tasks, workers, *, seconds):
        if processes:
            return in_processes(call, tasks, workers, seconds=seconds)
        return in_threads(call, tasks, workers)

    with mock.patch.object(updater, "in_processes", decode):
        if directory is None:
            return build_collection(request, options, retriever)
        return build_index(directory, request, options, retriever)


def make_with_captions(root, retriever, **fields):
    """(folder of films, index of their moments and captions) in a folder."""
    write_films(root / "films")
    captions = root / "captions.csv"
    captions.write_text("video,caption\na.mp4,grey becomes white\nsub/b.mp4,another film\n")
    make(root / "index", root / "films", retriever, captions, window=1.0, **fields)
    return root / "films", root / "index"


def content(directory):
    """{(path, start, end): vector} of an index."""
    statement = 'SELECT m.id, path, start, "end" FROM moments m JOIN files ON file = files.id'
    with catalog.reading(directory) as db:
        rows = list(db.execute(statement))
        store = open_store(directory, Index(directory).info, "moments", write=False)
        vectors = store.snapshot(db).get(np.array([row[0] for row in rows], np.int64))
    return {row[1:]: vector for row, vector in zip(rows, vectors, strict=True)}


def assert_same(one, other):
    """Compares two contents; embedding in other batches rounds otherwise."""
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_allclose(one[key], other[key], atol=1e-5)


def copy(source, target):
    """A folder with its dates."""
    return shutil.copytree(source, target, copy_function=shutil.copy2)
