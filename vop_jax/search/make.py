"""What it takes to make an index, or to bring one up to date; and what is refused."""

import dataclasses
import os
import pathlib

from vop_jax import retriever as retrievers
from vop_jax.errors import UserError
from vop_jax.retriever import Retriever
from vop_jax.search import catalog
from vop_jax.search.captions import read_captions
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.files import Found, find_videos
from vop_jax.search.indexing import Done, Making, locked, update

# What an index's folder may hold before there is an index: of a run that was killed early.
OF_A_START = (".lock", "vectors", "captions", catalog.FILE)
AGAIN = "give another --index for a new one"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for; None or "": what the index has, or the default of a new one.

    Attributes:
        folder: of videos.
        clip, prompts: files.
        window, stride: seconds; of a new index: whole clips alone, half of the window.
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
        _check_new(directory, asked, retriever)
    else:
        _check_same(directory, stored, asked)
    folder = os.path.abspath(asked.folder or (stored.folder if stored else ""))
    files = find_videos(folder, _known(directory) if stored else set())
    captions = read_captions(asked.captions, folder) if asked.captions else None
    clip = asked.clip or (stored.clip if stored else "")
    prompts = asked.prompts or (stored.prompts if stored else "")
    if retriever is None:
        retriever = retrievers.load(clip, prompts or None)
    info = _info(stored, asked, retriever, folder, clip, prompts)
    if stored is not None:
        _check_same_model(directory, stored, info)
        _check_folder(directory, stored, info, files)
    with locked(directory):
        return update(directory, info, retriever, files, making or Making(), captions)


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
        clip=os.path.abspath(clip) if clip else "",
        clip_fingerprint=retriever.clip_fingerprint,
        clip_name=retriever.clip_name,
        prompts=os.path.abspath(prompts) if prompts else "",
        prompts_fingerprint=retriever.prompts_fingerprint,
        method=retriever.method.name,
        frames=retriever.frames,
        dim=retriever.embed_dim,
        window=window,
        stride=stride,
        folder=folder,
        store=stored.store if stored else _absolute(asked.store),
    )


def windows(asked: Request) -> tuple[float, float]:
    """(window, stride) in seconds, as of a new index.

    Raises:
        UserError: one does not fit the other.
    """
    window = asked.window or 0.0
    if asked.stride is None:
        return window, window / 2
    if not window:
        raise UserError(f"--stride={asked.stride:g}: is of moments; give their --window too")
    if not 0 < asked.stride <= window:
        raise UserError(
            f"--stride={asked.stride:g}: must be above 0 and at most --window={window:g}, "
            "or parts of a video are in no moment"
        )
    return window, asked.stride


def _absolute(store: str) -> str:
    """A store's URI from wherever the index is opened."""
    scheme = "milvus-lite:"
    path = store.removeprefix(scheme)
    if not path or "://" in path:
        return store
    return (scheme if store.startswith(scheme) else "") + os.path.abspath(path)


def _check_new(directory: pathlib.Path, asked: Request, retriever: Retriever | None) -> None:
    if not asked.folder:
        raise UserError(f"{directory}: no index yet; name the folder of videos")
    if not asked.clip and retriever is None:
        raise UserError(f"{directory}: no index yet; give the model, --clip and --prompts")
    windows(asked)
    if directory.is_dir():
        others = {path.name for path in directory.iterdir()}
        others = {name for name in others if not name.startswith(OF_A_START)}
        if others:
            raise UserError(
                f"{directory}: holds {min(others)}, but no index; give an empty or new folder"
            )
    elif directory.exists():
        raise UserError(f"{directory}: a file; an index is a folder")


def _check_same(directory: pathlib.Path, stored: IndexInfo, asked: Request) -> None:
    """What can be told before the model is loaded."""
    made = {"window": stored.window, "stride": stored.stride}
    if asked.window is not None or asked.stride is not None:
        window = stored.window if asked.window is None else asked.window
        stride = asked.stride
        if stride is None and window == stored.window:
            stride = stored.stride
        given = dict(zip(made, windows(Request(window=window, stride=stride)), strict=True))
        for name in made:
            if made[name] != given[name]:
                raise UserError(
                    f"{directory}: was made with --{name}={made[name]:g}, not {given[name]:g}; "
                    + AGAIN
                )
    if asked.store and _absolute(asked.store) != stored.store:
        own = stored.store or "its own folder"
        raise UserError(f"{directory}: has its vectors in {own}, not in {asked.store}; {AGAIN}")


def _check_same_model(directory: pathlib.Path, stored: IndexInfo, given: IndexInfo) -> None:
    if stored.clip_fingerprint != given.clip_fingerprint:
        raise UserError(
            f"{directory}: was made with the CLIP {stored.clip_name}, not {given.clip_name}; "
            + AGAIN
        )
    if stored.prompts_fingerprint != given.prompts_fingerprint:
        one, other = (_prompts_of(info) for info in (stored, given))
        raise UserError(f"{directory}: was made with {one}, not with {other}; {AGAIN}")
    if stored.frames != given.frames:
        raise UserError(
            f"{directory}: was made with {stored.frames} frames a clip, not {given.frames}; {AGAIN}"
        )


def _prompts_of(info: IndexInfo) -> str:
    if not info.prompts_fingerprint:
        return "no prompts"
    return f"the {info.method} prompts {info.prompts} ({info.prompts_fingerprint[:12]})"


def _known(directory: pathlib.Path) -> set[str]:
    """Paths of the files that an index has."""
    with catalog.reading(directory) as db:
        return {row[0] for row in db.execute("SELECT path FROM files")}


def _check_folder(
    directory: pathlib.Path, stored: IndexInfo, given: IndexInfo, files: list[Found]
) -> None:
    """An index follows its folder where that is gone and this one holds its files."""
    if given.folder == stored.folder:
        return
    one = f"{directory}: is of the folder {stored.folder}, not of {given.folder}"
    if os.path.isdir(stored.folder):
        raise UserError(f"{one}; {AGAIN}")
    with catalog.reading(directory) as db:
        known = set(db.execute("SELECT path, size FROM files"))
    if not known & {(file.path, file.size) for file in files}:
        raise UserError(f"{one}, which has none of its files; {AGAIN}")
