"""Builds the index of a folder, or brings it up to date."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from vop_jax.errors import UserError
from vop_jax.inference import retriever as retrievers
from vop_jax.inference.retriever import Retriever
from vop_jax.search import catalog, sources
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.collection import vector_index
from vop_jax.search.scan import Scan
from vop_jax.search.searcher import check_model
from vop_jax.search.updater import (
    IndexOptions,
    IndexReport,
    Updater,
    read_captions,
    update_captions,
)
from vop_jax.search.writer import Caption, CatalogWriter
from vop_jax.storage import files, hub
from vop_jax.video import shots

OWN_FILES = (".lock", catalog.FILE)  # of an index whose first writer was killed early
OTHER_INDEX = "give another --index, or --store, for a new one"


@dataclasses.dataclass(frozen=True)
class IndexRequest:
    """What an index is made of; None or "": as it is, or the default of a new one.

    Attributes:
        folder: of videos, on a disk or in a bucket; or a pattern, or a manifest; see `sources`.
        clip, prompts: files.
        window, stride: seconds of the moments; by default a new index has whole clips only, and
            the stride is half of the window.
        shots: the moments are the shots of the videos.
        captions: a file of texts.
        store: URI of the vectors.
        dtype: of the model's matrix products, "auto" for the faster one on this device.
        keep_frames: also keeps the vectors of frames, to re-rank results by them.
        vector_index: of an index on a server: exact, or approximate with parameters.
    """

    folder: str = ""
    clip: str = ""
    prompts: str = ""
    window: float | None = None
    stride: float | None = None
    shots: bool = False
    captions: str = ""
    store: str = ""
    dtype: str = ""
    keep_frames: bool = False
    vector_index: str = ""


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
        indexed: dict[str, int] = {}
        if stored:
            with catalog.reading(directory) as db:
                indexed = dict(db.execute("SELECT path, size FROM files"))
        plan = plan_run(os.fspath(directory), stored, indexed, request, retriever)
        with contextlib.closing(CatalogWriter(directory, plan.info)) as writer:
            if plan.captions is not None:
                update_captions(plan.captions, writer, plan.retriever, plan.report)
            options = options or IndexOptions()
            Updater(writer, plan.info, plan.retriever, options, plan.report).run(plan.scan)
            writer.compact()
            writer.calibrate(plan.retriever)
        return plan.report


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of `index` goes by.

    Attributes:
        info: what the index is made with from now on.
        scan: the files of the folder.
        captions: texts to search; None leaves those of the index.
        report: that the run completes.
    """

    info: IndexInfo
    retriever: Retriever
    scan: Scan
    captions: list[Caption] | None
    report: IndexReport


def plan_run(
    name: str,
    stored: IndexInfo | None,
    indexed: Mapping[str, int],
    request: IndexRequest,
    retriever: Retriever | None,
) -> Plan:
    """Compares a request with the index, and loads what both need.

    Args:
        name: of the index, for messages.
        stored: what the index was made with; None for a new one.
        indexed: sizes of its files by path.

    Raises:
        UserError: there are no videos, or the index was made in another way (names both).
    """
    request = _complete_request(name, stored, request, retriever is not None)
    if request.shots:
        _check_shots(request)
    folder = sources.absolute(request.folder)
    scan = sources.find(folder, indexed)
    captions = (
        read_captions(request.captions, sources.root_of(folder)) if request.captions else None
    )
    # First: what a name of the Hub means may change while the model loads.
    request = dataclasses.replace(
        request,
        clip=hub.pin(request.clip, hub.CLIP_FILE),
        prompts=hub.pin(request.prompts, hub.PROMPTS_FILE),
    )
    if retriever is None:
        frames = stored.frames if stored else None
        retriever = retrievers.load(
            request.clip, request.prompts or None, frames=frames, dtype=request.dtype or "auto"
        )
    if stored:
        check_model(name, stored, retriever)
        if folder != stored.folder:  # it follows a folder that moved
            message = f"{name}: indexes the folder {stored.folder}, not {folder}"
            if os.path.isdir(stored.folder) or not sources.is_plain(stored.folder):
                raise UserError(f"{message}; {OTHER_INDEX}")
            if not any(indexed.get(file.path) == file.size for file in scan.files):
                raise UserError(f"{message}, which has none of its files; {OTHER_INDEX}")
    report = IndexReport(unlisted=scan.unlisted)
    return Plan(_info(request, retriever, folder), retriever, scan, captions, report)


def _info(request: IndexRequest, retriever: Retriever, folder: str) -> IndexInfo:
    return IndexInfo(
        version=catalog.VERSION,
        clip=absolute(request.clip),
        clip_fingerprint=retriever.clip_fingerprint,
        clip_name=retriever.clip_name,
        prompts=absolute(request.prompts),
        prompts_fingerprint=retriever.prompts_fingerprint,
        method=retriever.method.name,
        frames=retriever.frames,
        dim=retriever.embed_dim,
        window=request.window or 0.0,
        stride=request.stride or 0.0,
        folder=folder,
        store=absolute(request.store),
        dtype=retriever.dtype,
        shots=request.shots,
        keep_frames=request.keep_frames,
        vector_index=request.vector_index or "FLAT",
    )


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Makes this process the only writer of an index; removes a new folder that gets no index.

    Raises:
        UserError: another process writes it, it cannot be written, or it holds other files.
    """
    new = not directory.exists()
    if directory.is_file():
        raise UserError(f"{directory}: a file; an index is a folder")
    if directory.is_dir() and not (directory / catalog.FILE).exists():
        others = [path.name for path in directory.iterdir() if not path.name.startswith(OWN_FILES)]
        if others:
            raise UserError(
                f"{directory}: holds {min(others)}, but no index; give an empty or new folder"
            )
    with files.folder_lock(directory, "another process is writing this index"):
        try:
            yield
        finally:
            if new and catalog.stored_info(directory) is None:
                shutil.rmtree(directory, ignore_errors=True)


def absolute(uri: str) -> str:
    """A path or a store's URI that is valid in any working directory."""
    scheme = "milvus-lite:"
    path = uri.removeprefix(scheme)
    if not path or "://" in path:
        return uri
    return (scheme if uri.startswith(scheme) else "") + os.path.abspath(path)


def _check_shots(request: IndexRequest) -> None:
    """Raises UserError for windows, too, or without a PySceneDetect that works."""
    if request.window or request.stride:
        raise UserError("--shots: not with --window or --stride; a moment is a shot or a window")
    try:  # before files are called unreadable
        shots.CutDetector()
    except ImportError as error:
        raise UserError(f'shots need PySceneDetect ({error}): pip install -e ".[shots]"') from None


def _complete_request(
    name: str, stored: IndexInfo | None, request: IndexRequest, has_model: bool
) -> IndexRequest:
    """The request with the values of the index in its empty fields, or defaults for a new one.

    Raises:
        UserError: a new index cannot be made of this, or the index was made of something else.
    """
    window, stride = request.window, request.stride
    if stored is None:
        if not request.folder:
            raise UserError(f"{name}: no index yet; name the folder of videos")
        if not request.clip and not has_model:
            raise UserError(f"{name}: no index yet; give the model, --clip and --prompts")
        if stride is None:
            return dataclasses.replace(request, stride=(window or 0.0) / 2)
        if not window:
            raise UserError(f"--stride={stride:g}: needs --window, the length of the moments")
        if not 0 < stride <= window:
            raise UserError(
                f"--stride={stride:g}: must be above 0 and at most --window={window:g}, "
                "or parts of a video are in no moment"
            )
        return request
    for key, value, own in (("window", window, stored.window), ("stride", stride, stored.stride)):
        if value is not None and value != own:
            made = f"with --{key}={own:g}" if own else f"without --{key}"
            raise UserError(f"{name}: was made {made}, not {value:g}; {OTHER_INDEX}")
    for key, flag in (("shots", "--shots"), ("keep_frames", "--keep_frames")):
        if getattr(request, key) and not getattr(stored, key):
            raise UserError(f"{name}: was made without {flag}; {OTHER_INDEX}")
    if request.store and absolute(request.store) != stored.store:
        message = f"keeps its vectors in {stored.store or 'its own folder'}, not in {request.store}"
        raise UserError(f"{name}: {message}; {OTHER_INDEX}")
    if request.dtype not in ("", "auto", stored.dtype):
        message = f"was made with --dtype={stored.dtype}, not {request.dtype}"
        raise UserError(f"{name}: {message}; {OTHER_INDEX}")
    if request.vector_index:
        new, old = (vector_index.parse(x.vector_index) for x in (request, stored))
        if (new.kind, new.build) != (old.kind, old.build):
            message = f"was made with --vector_index={stored.vector_index}"
            raise UserError(f"{name}: {message}, not {request.vector_index}; {OTHER_INDEX}")
    request = dataclasses.replace(request, dtype=stored.dtype)
    fields = (
        "folder",
        "clip",
        "prompts",
        "window",
        "stride",
        "shots",
        "store",
        "keep_frames",
        "vector_index",
    )
    return dataclasses.replace(
        request, **{key: getattr(request, key) or getattr(stored, key) for key in fields}
    )
