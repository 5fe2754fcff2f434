"""Builds the index of a folder, or brings it up to date."""

import contextlib
import dataclasses
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
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.scan import find_videos
from vop_jax.search.searcher import check_model
from vop_jax.search.updater import (
    IndexOptions,
    IndexReport,
    Updater,
    read_captions,
    update_captions,
)
from vop_jax.search.writer import CatalogWriter

OWN_FILES = (".lock", catalog.FILE)  # of an index whose first writer was killed early
OTHER_INDEX = "give another --index for a new one"


@dataclasses.dataclass(frozen=True)
class IndexRequest:
    """What an index is made of; None or "": as it is, or the default of a new one.

    Attributes:
        folder: of videos.
        clip, prompts: files.
        window, stride: seconds of the moments; by default a new index has whole clips only, and
            the stride is half of the window.
        captions: a file of texts.
        store: URI of the vectors.
    """

    folder: str = ""
    clip: str = ""
    prompts: str = ""
    window: float | None = None
    stride: float | None = None
    captions: str = ""
    store: str = ""


def build_index(
    directory: str | os.PathLike,
    request: IndexRequest,
    options: IndexOptions | None = None,
    retriever: Retriever | None = None,
) -> IndexReport:
    """Indexes a folder of videos, or brings its index up to date; safe to kill at any time.

    Args:
        directory: of the index.
        retriever: the model, if it is loaded already.

    Raises:
        UserError: there are no videos, or the index was made in another way (names both).
        OSError: the disk is full; what is done stays, and the next call continues.
    """
    directory = pathlib.Path(directory)
    with locked(directory):  # also while the folder is listed, so that nobody adds files meanwhile
        stored = catalog.stored_info(directory)
        window, stride = _check_request(directory, stored, request, retriever is not None)
        indexed = _indexed_sizes(directory) if stored else {}
        folder = os.path.abspath(request.folder or (stored.folder if stored else ""))
        clip = request.clip or (stored.clip if stored else "")
        prompts = request.prompts or (stored.prompts if stored else "")
        scan = find_videos(folder, indexed)
        captions = read_captions(request.captions, folder) if request.captions else None
        if retriever is None:
            frames = stored.frames if stored else None
            retriever = retrievers.load(clip, prompts or None, frames=frames)
        if stored:
            check_model(directory, stored, retriever)
            sizes = {file.path: file.size for file in scan.files}
            _check_folder(directory, stored, folder, bool(indexed.items() & sizes.items()))
        info = IndexInfo(
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
            store=stored.store if stored else absolute(request.store),
        )
        report = IndexReport(unlisted=scan.unlisted)
        with contextlib.closing(CatalogWriter(directory, info)) as writer:
            if captions is not None:
                update_captions(captions, writer, retriever, report)
            Updater(writer, info, retriever, options or IndexOptions(), report).run(scan)
            writer.compact()
        return report


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Makes this process the only writer of an index; removes a new folder that gets no index.

    Raises:
        UserError: another process writes it, it cannot be written, or it holds other files.
    """
    new = not directory.exists()
    lock = filelock.FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in directory.iterdir() if not path.name.startswith(OWN_FILES)]
        if others and not (directory / catalog.FILE).exists():
            raise UserError(
                f"{directory}: holds {min(others)}, but no index; give an empty or new folder"
            )
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{directory}: another process is writing this index") from None
    except FileExistsError:
        raise UserError(f"{directory}: a file; an index is a folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{directory}: not a folder to write in ({error.strerror})") from None
    try:
        yield
    finally:
        if new and catalog.stored_info(directory) is None:
            shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def absolute(uri: str) -> str:
    """A path or a store's URI that is valid in any working directory."""
    scheme = "milvus-lite:"
    path = uri.removeprefix(scheme)
    if not path or "://" in path:
        return uri
    return (scheme if uri.startswith(scheme) else "") + os.path.abspath(path)


def _check_request(
    directory: pathlib.Path, stored: IndexInfo | None, request: IndexRequest, has_model: bool
) -> tuple[float, float]:
    """(window, stride) of the index.

    Raises:
        UserError: a new index cannot be made of this, or the index was made of something else.
    """
    if stored is None:
        if not request.folder:
            raise UserError(f"{directory}: no index yet; name the folder of videos")
        if not request.clip and not has_model:
            raise UserError(f"{directory}: no index yet; give the model, --clip and --prompts")
        return _window_and_stride(request)
    for name in ("window", "stride"):
        value, own = getattr(request, name), getattr(stored, name)
        if value is not None and value != own:
            made = f"with --{name}={own:g}" if own else f"without --{name}"
            raise UserError(f"{directory}: was made {made}, not {value:g}; {OTHER_INDEX}")
    if request.store and absolute(request.store) != stored.store:
        own = stored.store or "its own folder"
        raise UserError(
            f"{directory}: has its vectors in {own}, not in {request.store}; {OTHER_INDEX}"
        )
    return stored.window, stored.stride


def _window_and_stride(request: IndexRequest) -> tuple[float, float]:
    window = request.window or 0.0
    if request.stride is None:
        return window, window / 2
    if not window:
        raise UserError(f"--stride={request.stride:g}: is of moments; give their --window too")
    if not 0 < request.stride <= window:
        raise UserError(
            f"--stride={request.stride:g}: must be above 0 and at most --window={window:g}, "
            "or parts of a video are in no moment"
        )
    return window, request.stride


def _indexed_sizes(directory: pathlib.Path) -> dict[str, int]:
    """{path: size} of the files of an index."""
    with catalog.reading(directory) as db:
        return dict(db.execute("SELECT path, size FROM files"))


def _check_folder(
    directory: pathlib.Path, stored: IndexInfo, folder: str, has_its_files: bool
) -> None:
    """Lets an index follow its folder, if that is gone and this one has files of it."""
    if folder == stored.folder:
        return
    message = f"{directory}: is of the folder {stored.folder}, not of {folder}"
    if os.path.isdir(stored.folder):
        raise UserError(f"{message}; {OTHER_INDEX}")
    if not has_its_files:
        raise UserError(f"{message}, which has none of its files; {OTHER_INDEX}")
