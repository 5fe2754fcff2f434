"""Whether what is asked for is what an index was made with; what cannot be asked for."""

import dataclasses
import os
import pathlib

from vop_jax.errors import UserError
from vop_jax.inference.retriever import Retriever
from vop_jax.search import catalog
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.scan import Found

# What an index's folder may hold before there is an index: of a run that was killed early.
OF_A_START = (".lock", catalog.FILE)
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


def absolute(uri: str) -> str:
    """A path, or a store's URI, from wherever the index is opened."""
    scheme = "milvus-lite:"
    path = uri.removeprefix(scheme)
    if not path or "://" in path:
        return uri
    return (scheme if uri.startswith(scheme) else "") + os.path.abspath(path)


def check_new(directory: pathlib.Path, asked: Request, has_model: bool) -> None:
    """Raises UserError where no new index can be made, or not of this."""
    if not asked.folder:
        raise UserError(f"{directory}: no index yet; name the folder of videos")
    if not asked.clip and not has_model:
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


def check_same(directory: pathlib.Path, stored: IndexInfo, asked: Request) -> None:
    """Raises UserError, naming both, where the index is another; before the model is loaded."""
    made = {"window": stored.window, "stride": stored.stride}
    if asked.window is not None or asked.stride is not None:
        window = stored.window if asked.window is None else asked.window
        stride = asked.stride
        if stride is None and window == stored.window:
            stride = stored.stride
        given = dict(zip(made, windows(Request(window=window, stride=stride)), strict=True))
        for name in made:
            if made[name] != given[name]:
                own = f"with --{name}={made[name]:g}" if made[name] else f"without --{name}"
                raise UserError(f"{directory}: was made {own}, not {given[name]:g}; {AGAIN}")
    if asked.store and absolute(asked.store) != stored.store:
        own = stored.store or "its own folder"
        raise UserError(f"{directory}: has its vectors in {own}, not in {asked.store}; {AGAIN}")


def check_same_model(directory: str | os.PathLike, stored: IndexInfo, retriever: Retriever) -> None:
    """Raises UserError, naming both, where its vectors are of another model."""
    if stored.clip_fingerprint != retriever.clip_fingerprint:
        raise UserError(
            f"{directory}: was made with the CLIP {stored.clip_name}, not with "
            f"{retriever.clip_name}; give that --clip, or another --index for a new one"
        )
    given = retriever.method.name, retriever.prompts_fingerprint, retriever.frames
    if (stored.prompts_fingerprint, stored.frames) != given[1:]:
        made = _told(stored.method, stored.prompts_fingerprint, stored.frames, stored.prompts)
        raise UserError(
            f"{directory}: was made with {made}, not with {_told(*given)}; give those --prompts, "
            "or another --index for a new one"
        )


def _told(method: str, fingerprint: str, frames: int, path: str = "") -> str:
    which = " ".join(filter(None, (f"{method} prompts", path, f"({fingerprint[:12]})")))
    return f"{which if fingerprint else 'no prompts'} and {frames} frames a clip"


def check_folder(
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
