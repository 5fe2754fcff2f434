"""Texts to be found by a video: of a file of annotations, or one a line."""

import math
import os

from tqdm import tqdm

from vop_jax.data.datasets.folder import read_folder
from vop_jax.errors import UserError
from vop_jax.inference.retriever import Retriever
from vop_jax.search.catalog import Catalog

Row = tuple[str, str, float, float]  # text, path of a video or "", start, end
TEXTS = 256  # embedded and stored at once


def read_captions(path: str, folder: str) -> list[Row]:
    """The captions of a file, each once.

    Args:
        path: CSV or JSON Lines as for training (see `read_folder`), or `.txt` with one a line.
        folder: of the videos that it names.

    Raises:
        UserError: it is not as described, or empty.
    """
    rows: list[Row] = []
    if path.lower().endswith(".txt"):
        try:
            with open(path, encoding="utf-8-sig") as file:
                rows = [(line.strip(), "", 0.0, 0.0) for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            why = error.reason if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UserError(f"{path}: not readable as text ({why})") from None
    else:
        for clips in read_folder(path, folder).values():
            for clip in clips:
                video = os.path.relpath(clip.path, folder).replace(os.sep, "/")
                end = math.inf if clip.end is None else clip.end
                rows += [(text, video, clip.start or 0.0, end) for text in clip.captions]
    if not rows:
        raise UserError(f"{path}: no captions in it")
    return list(dict.fromkeys(rows))


def update_captions(rows: list[Row], catalog: Catalog, retriever: Retriever) -> tuple[int, int]:
    """Makes these the captions of an index; (how many are new, how many of them were cut)."""
    there, wanted = catalog.captions(), set(rows)
    gone = [number for row, number in there.items() if row not in wanted]
    new = [row for row in rows if row not in there]
    cut = retriever.count_truncated([row[0] for row in new]) if new else 0
    for first in tqdm(range(0, len(new), TEXTS), "captions", disable=not new):
        some = new[first : first + TEXTS]
        vectors = retriever.embed_text([row[0] for row in some])
        with catalog.transaction():
            catalog.add_captions(some, vectors)
    if gone:
        with catalog.transaction():
            catalog.remove_captions(gone)
    return len(new), cut
