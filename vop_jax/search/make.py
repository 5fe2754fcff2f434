"""A folder becomes an index, or its index is brought up to date."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

import filelock
import numpy as np
from absl import logging

from vop_jax import retriever as retrievers
from vop_jax.errors import UserError
from vop_jax.retriever import Retriever
from vop_jax.search import catalog
from vop_jax.search.asked import (
    Request,
    absolute,
    check_folder,
    check_new,
    check_same,
    check_same_model,
    windows,
)
from vop_jax.search.captions import Row, read_captions, update_captions
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.files import Found, find_videos
from vop_jax.search.index import vectors_uri
from vop_jax.search.indexing import Done, Making, Update
from vop_jax.search.store import VectorStore, open_store
from vop_jax.search.writing import Catalog

TABLES = {"videos": "moments", "captions": "captions"}  # and where their vectors are told


def make_index(
    directory: str | os.PathLike,
    asked: Request,
    making: Making | None = None,
    retriever: Retriever | None = None,
) -> Done:
    """Indexes a folder of videos, or brings its index up to date; safe to kill at any time.

    Args:
        directory: of the index.
        retriever: the model itself, where it is there already.

    Raises:
        UserError: there are no videos, or the index was made in another way (names both).
        OSError: the disk is full; what is done stays, and the next call goes on.
    """
    directory = pathlib.Path(directory)
    stored = catalog.stored_info(directory)
    if stored is None:
        check_new(directory, asked, retriever is not None)
    else:
        check_same(directory, stored, asked)
    folder = os.path.abspath(asked.folder or (stored.folder if stored else ""))
    files = find_videos(folder, _known(directory) if stored else set())
    captions = read_captions(asked.captions, folder) if asked.captions else None
    clip = asked.clip or (stored.clip if stored else "")
    prompts = asked.prompts or (stored.prompts if stored else "")
    if retriever is None:
        frames = stored.frames if stored else None
        retriever = retrievers.load(clip, prompts or None, frames=frames)
    info = _info(stored, asked, retriever, folder, clip, prompts)
    if stored is not None:
        check_same_model(directory, stored, retriever)
        check_folder(directory, stored, info, files)
    with locked(directory):
        if catalog.stored_info(directory) != stored:
            raise UserError(f"{directory}: another process made this index meanwhile; run it again")
        return _update(directory, info, retriever, files, making or Making(), captions)


def _info(
    stored: IndexInfo | None,
    asked: Request,
    retriever: Retriever,
    folder: str,
    clip: str,
    prompts: str,
) -> IndexInfo:
    window, stride = (stored.window, stored.stride) if stored else windows(asked)
    return IndexInfo(
        version=catalog.VERSION,
        clip=absolute(clip),
        clip_fingerprint=retriever.clip_fingerprint,
        clip_name=retriever.clip_name,
        prompts=absolute(prompts),
        prompts_fingerprint=retriever.prompts_fingerprint,
        method=retriever.method.name,
        frames=retriever.frames,
        dim=retriever.embed_dim,
        window=window,
        stride=stride,
        folder=folder,
        store=stored.store if stored else absolute(asked.store),
    )


def _known(directory: pathlib.Path) -> set[str]:
    """Paths of the files that an index has."""
    with catalog.reading(directory) as db:
        return {row[0] for row in db.execute("SELECT path FROM files")}


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """One process at a time changes an index.

    Raises:
        UserError: another one does, or it cannot be written.
    """
    lock, fresh = filelock.FileLock(directory / ".lock"), not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{directory}: another process is writing this index") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{directory}: not a folder to write in ({error.strerror})") from None
    try:
        yield
    finally:
        if fresh and catalog.stored_info(directory) is None:  # nothing came of it
            shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def _update(
    directory: pathlib.Path,
    info: IndexInfo,
    retriever: Retriever,
    files: list[Found],
    making: Making,
    captions: list[Row] | None = None,
) -> Done:
    """Makes an index of these files, or brings it up to date; inside of `locked`.

    Args:
        info: what it is, or shall be, made with.
        files: all that there are.
        captions: all that there shall be; None: those that there are.

    Raises:
        OSError: the disk is full; what is done stays, and the next call goes on.
    """
    with contextlib.ExitStack() as stack:
        stores = {}  # before there is a catalog, which would bind it to a store that is not there
        for target in TABLES:
            uri = vectors_uri(directory, info.store, target)
            stores[target] = open_store(uri, info.dim, write=True)
            stack.callback(stores[target].close)
        _check_own(directory, info, len(stores["videos"]))
        own = Catalog.open(directory, info)
        stack.callback(own.close)
        for target, table in TABLES.items():
            _mend(own, table, stores[target])
        done = Done()
        if captions is not None:
            done.captions, done.cut = update_captions(captions, own, stores["captions"], retriever)
        Update(own, stores["videos"], retriever, making, done).run(info, files)
        return done


def _check_own(directory: pathlib.Path, info: IndexInfo, vectors: int) -> None:
    """Raises UserError where a new index would take the vectors of another for its own."""
    # There is a catalog before there is a vector, so these are nobody's whom it knows.
    if info.store and vectors and catalog.stored_info(directory) is None:
        raise UserError(
            f"store {info.store}: holds {vectors} vectors, which are not of {directory}; give an "
            "empty one, of Milvus with another #COLLECTION behind it"
        )


def _mend(own: Catalog, table: str, store: VectorStore) -> None:
    """Removes vectors of an earlier run that was cut off, and notices lost ones."""
    known, there = own.ids(table), store.ids()
    store.delete(np.setdiff1d(there, known, assume_unique=True))
    lost = np.setdiff1d(known, there, assume_unique=True)
    if not len(lost):
        return
    logging.warning("%d vectors of %s are lost; they are made again", len(lost), table)
    with own.transaction():
        if table == "moments":
            own.doubt(lost)
        else:
            own.remove_captions(lost.tolist())
