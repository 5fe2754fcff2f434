"""The indexes that are served, by name."""

import pathlib
import re
from collections.abc import Sequence

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
        opened = (searcher.retriever for searcher in library.values())
        library[_name(directory, library)] = open_searcher(directory, clip=clip, others=opened)
    return library


def _name(directory: str, library: Library) -> str:
    """The folder's own name, as it may stand in an address; a second one of it is NAME-2."""
    own = pathlib.Path(directory).resolve().name
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", own).strip("-.") or "index"
    name, number = stem, 1
    while name in library:
        number += 1
        name = f"{stem}-{number}"
    return name
