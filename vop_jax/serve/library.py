"""The indexes that are served, by name."""

import pathlib
import re
from collections.abc import Sequence

from vop_jax.errors import UserError
from vop_jax.search.index import Index
from vop_jax.search.searcher import Searcher, open_searcher

Library = dict[str, Searcher]  # by name; the first is meant where none is named


def open_library(directories: Sequence[str], clip: str | None = None) -> Library:
    """Opens indexes; those made with one CLIP share it in memory.

    Args:
        clip: where the weights are now, if they have moved.

    Raises:
        UserError: there is no such index, or its model is gone.
    """
    library: Library = {}
    for directory in directories:
        info = Index.open(directory).info
        if "://" in info.folder:
            raise UserError(f"{directory}: is of {info.folder}; only local files can be served")
        library[_name(directory, library)] = _open(directory, clip, library)
    return library


def _open(directory: str, clip: str | None, library: Library) -> Searcher:
    info = Index.open(directory).info
    opened = (searcher.retriever for searcher in library.values())
    shared = next((r for r in opened if r.clip_fingerprint == info.clip_fingerprint), None)
    if shared is None:
        return open_searcher(directory, clip=clip)
    if info.prompts and not pathlib.Path(info.prompts).exists():
        raise UserError(f"{info.prompts}: gone since {directory} was made")
    retriever = shared.with_prompts(info.prompts or None)
    if retriever.frames != info.frames:
        retriever = shared.with_prompts(info.prompts or None, frames=info.frames)
    return open_searcher(directory, retriever=retriever)


def _name(directory: str, library: Library) -> str:
    """The folder's own name, as it may stand in an address; a second one of it is NAME-2."""
    own = pathlib.Path(directory).resolve().name
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", own).strip("-.") or "index"
    name, number = stem, 1
    while name in library:
        number += 1
        name = f"{stem}-{number}"
    return name
