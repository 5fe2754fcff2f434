"""An index with the model that made it: text, pictures and videos in, moments out."""

import os
from collections.abc import Iterable

import numpy as np
from etils import epath

from vop_jax.errors import UserError, VideoError
from vop_jax.inference.retriever import Retriever, load
from vop_jax.search.asked import check_same_model
from vop_jax.search.index import Hit, Index
from vop_jax.video.images import decode_picture
from vop_jax.video.moments import read_segment


class Searcher:
    """An `Index` and its `Retriever`; made by `vop_jax.search.open`. Threads may share it.

    Filters are those of `Index.search`: `folder`, `since`, `until`, `per_file`, and `to`.
    """

    def __init__(self, index: Index, retriever: Retriever):
        check_same_model(index.directory, index.info, retriever)
        self.index, self.retriever = index, retriever

    def text(self, query: str, k: int = 10, **filters) -> list[Hit]:
        """What shows, or says, what the query says.

        Raises:
            UserError: an empty query, or a wrong filter.
        """
        return self.nearest(self.vector(query), k, **filters)

    def video(
        self, path: str | os.PathLike, k: int = 10, to: str = "videos", **filters
    ) -> list[Hit]:
        """What is like a video, or the captions that describe it.

        Raises:
            UserError: it cannot be read, with the reason.
        """
        return self.nearest(self.retriever.embed_videos([path])[0], k, to=to, **filters)

    def image(self, path: str | os.PathLike, k: int = 10, **filters) -> list[Hit]:
        """What is like a picture.

        Raises:
            UserError: it cannot be read, with the reason.
        """
        return self.nearest(self.retriever.embed_images([read_image(path)])[0], k, **filters)

    def vector(self, query: str) -> np.ndarray:
        """float32 [E] of a text.

        Raises:
            UserError: there is nothing in it.
        """
        if not query.strip():
            raise UserError("the query is empty; say what to look for")
        return self.retriever.embed_text([query])[0]

    def nearest(self, vector: np.ndarray, k: int = 10, **filters) -> list[Hit]:
        """What is near to a unit vector [E]."""
        return self.index.search(vector[None], k, **filters)[0]

    def explain(self, query: str | np.ndarray, hit: Hit) -> tuple[list[float], list[float]]:
        """(seconds, score) of each frame of the hit's moment, or file: how near the query is.

        Args:
            query: a text, or a unit vector [E].

        Raises:
            UserError: the file is gone or cannot be read.
        """
        vector = self.vector(query) if isinstance(query, str) else query
        path = self.index.path_of(hit.file_id)
        try:
            pixels, seconds = read_segment(path, self.retriever.frame_spec, hit.start, hit.end)
        except VideoError as error:
            raise UserError(f"{path}: {error}") from None
        each = self.retriever.embed_each_frame(pixels[None])[0]
        return seconds, [float(score) for score in each @ vector]


def open_searcher(
    directory: str | os.PathLike,
    clip: str | os.PathLike | None = None,
    prompts: str | os.PathLike | None = None,
    retriever: Retriever | None = None,
    others: Iterable[Retriever] = (),
) -> Searcher:
    """Opens an index and the model that made it.

    Args:
        clip, prompts: where the files are now, if they have moved.
        retriever: the model itself, where it is there already.
        others: models, of which one over the same CLIP shares it.

    Raises:
        UserError: there is no such index; the files are gone, or are of another model.
    """
    index = Index.open(directory)
    index.open_vectors()
    if retriever is None:
        info = index.info
        its_prompts = _there(directory, "--prompts", prompts or info.prompts)
        same = (r for r in others if r.clip_fingerprint == info.clip_fingerprint)
        if (other := next(same, None)) is not None:
            retriever = other.with_prompts(its_prompts, frames=info.frames)
        else:
            its_clip = _there(directory, "--clip", clip or info.clip)
            if its_clip is None:
                raise UserError(f"{directory}: names no CLIP of its own; say --clip=FILE")
            retriever = load(its_clip, its_prompts, frames=info.frames)
    return Searcher(index, retriever)


def _there(
    directory: str | os.PathLike, option: str, path: str | os.PathLike
) -> str | os.PathLike | None:
    """A file that an index was made with; None where it was made without."""
    if path and not epath.Path(path).exists():
        raise UserError(f"{path}: gone since {directory} was made; say {option}=FILE")
    return path or None


def read_image(path: str | os.PathLike) -> np.ndarray:
    """uint8 [H, W, 3] of a picture, upright.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return decode_picture(file)
    except FileNotFoundError:
        raise UserError(f"{os.fspath(path)}: no such file") from None
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror}") from None
    except VideoError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None
