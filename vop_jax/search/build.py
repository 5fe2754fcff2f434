"""A folder becomes an index, or its index is brought up to date."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

import filelock

from vop_jax.errors import UserError
from vop_jax.inference import retriever as retrievers
from vop_jax.inference.retriever import Retriever
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
from vop_jax.search.catalog import Catalog, IndexInfo
from vop_jax.search.scan import Scan, find_videos
from vop_jax.search.updater import Done, Making, Update


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
    with locked(directory):  # before the folder is looked through: nobody adds files meanwhile
        if catalog.stored_info(directory) != stored:
            raise UserError(f"{directory}: another process made this index meanwhile; run it again")
        folder = os.path.abspath(asked.folder or (stored.folder if stored else ""))
        scan = find_videos(folder, _known(directory) if stored else set())
        captions = read_captions(asked.captions, folder) if asked.captions else None
        clip = asked.clip or (stored.clip if stored else "")
        prompts = asked.prompts or (stored.prompts if stored else "")
        if retriever is None:
            frames = stored.frames if stored else None
            retriever = retrievers.load(clip, prompts or None, frames=frames)
        info = _info(stored, asked, retriever, folder, clip, prompts)
        if stored is not None:
            check_same_model(directory, stored, retriever)
            check_folder(directory, stored, info, scan.files)
        return _update(directory, info, retriever, scan, making or Making(), captions)


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
    scan: Scan,
    making: Making,
    captions: list[Row] | None = None,
) -> Done:
    """Makes an index of these files, or brings it up to date; inside of `locked`.

    Args:
        info: what it is, or shall be, made with.
        scan: all files that there are.
        captions: all that there shall be; None: those that there are.

    Raises:
        OSError: the disk is full; what is done stays, and the next call goes on.
    """
    with contextlib.closing(Catalog.open(directory, info)) as own:
        done = Done(unlisted=scan.unlisted)
        if captions is not None:
            done.captions, done.cut = update_captions(captions, own, retriever)
        Update(own, retriever, making, done).run(info, scan)
        own.compact()
        return done
