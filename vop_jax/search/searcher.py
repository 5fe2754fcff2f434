"""An index with its model: text, pictures and videos in, moments out."""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Union

import numpy as np
from etils import epath

from vop_jax.errors import UserError, VideoError
from vop_jax.inference.retriever import Retriever, load
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.index import Hit, Index
from vop_jax.search.stores import client
from vop_jax.storage import hub

if TYPE_CHECKING:
    from vop_jax.search.collection.index import CollectionIndex

AnyIndex = Union[Index, "CollectionIndex"]


class Searcher:
    """An `Index` and its `Retriever`; made by `vop_jax.search.open`. Threads may share it.

    Filters are those of `Index.search`: `to`, `folder`, `since`, `until`, `per_file`, `min_score`.
    Each search raises UserError for a wrong filter, and for a query that is empty or cannot be
    read.
    """

    def __init__(self, index: AnyIndex, retriever: Retriever):
        check_model(index.name, index.info, retriever)
        self.index, self.retriever = index, retriever

    def text(
        self, query: str, k: int = 10, min_score: float | str | None = "auto", **filters
    ) -> list[Hit]:
        """The moments, or captions, nearest to a text; [] if the index shows nothing like it.

        `min_score` is a cosine, None for all k, or "auto" for the index's own minimum.
        """
        return self.nearest(self.vector(query), k, min_score=min_score, **filters)

    def texts(
        self, queries: Sequence[str], k: int = 10, min_score: float | str | None = "auto", **filters
    ) -> list[list[Hit]]:
        """The hits of each text, from one batch of the model and one pass over the vectors."""
        return self.index.search(self.vectors(queries), k, min_score=min_score, **filters)

    def video(
        self, path: str | os.PathLike, k: int = 10, to: str = "videos", **filters
    ) -> list[Hit]:
        """The moments, or captions, nearest to a video."""
        return self.nearest(self.retriever.embed_videos([path])[0], k, to=to, **filters)

    def image(self, path: str | os.PathLike, k: int = 10, **filters) -> list[Hit]:
        """The moments, or captions, nearest to a picture."""
        return self.nearest(self.retriever.embed_images([read_image(path)])[0], k, **filters)

    def vector(self, query: str) -> np.ndarray:
        """float32 [E] of a text."""
        if not query.strip():
            raise UserError("the query is empty; say what to look for")
        return self.retriever.embed_text([query])[0]

    def vectors(self, queries: Sequence[str]) -> np.ndarray:
        """float32 [N, E] of N texts."""
        for number, query in enumerate(queries, 1):
            if not query.strip():
                raise UserError(f"query {number} is empty; say what to look for")
        return self.retriever.embed_text(queries)

    def nearest(self, vector: np.ndarray, k: int = 10, **filters) -> list[Hit]:
        """The moments, or captions, nearest to a unit vector [E]."""
        return self.index.search(vector[None], k, **filters)[0]

    def explain(self, query: str | np.ndarray, hit: Hit) -> tuple[list[float], list[float]]:
        """(seconds, scores) of the F frames of a hit: how near the query is to each.

        Args:
            query: a text, or a unit vector [E].

        Raises:
            UserError: the file is missing or cannot be read.
        """
        from vop_jax.video.moments import read_segment  # late: PyAV

        vector = self.vector(query) if isinstance(query, str) else query
        path = self.index.path_of(hit.file_id)
        try:
            pixels, seconds = read_segment(path, self.retriever.frame_spec, hit.start, hit.end)
        except VideoError as error:
            raise UserError(f"{path}: {error}") from None
        each = self.retriever.embed_each_frame(pixels[None])[0]
        return seconds, [float(score) for score in each @ vector]


def open_index(place: str | os.PathLike, *, fresh: bool = True) -> AnyIndex:
    """Opens an index: a folder, or http://HOST:PORT#NAME of a Milvus server.

    Args:
        fresh: sees all that was written before a search; without it, a server answers sooner.

    Raises:
        UserError: there is no such index, or it is damaged.
    """
    if not client.is_server(os.fspath(place)):
        return Index(place)
    from vop_jax.search.collection.index import CollectionIndex

    return CollectionIndex(os.fspath(place), fresh=fresh)


def open_searcher(
    directory: str | os.PathLike,
    clip: str | os.PathLike | None = None,
    prompts: str | os.PathLike | None = None,
    retriever: Retriever | None = None,
    others: Iterable[Retriever] = (),
    fresh: bool = True,
) -> Searcher:
    """Opens an index and the model that made it.

    Args:
        directory: of the index, or its address, see `open_index`.
        clip, prompts: the files, if they have moved.
        retriever: the model, if it is loaded already.
        others: loaded models; one with the same CLIP shares it.
        fresh: see `open_index`.

    Raises:
        UserError: there is no such index; the files are missing, or of another model.
    """
    index = open_index(directory, fresh=fresh)
    index.open_vectors()
    if retriever is None:
        info = index.info
        prompts = _existing(directory, "--prompts", prompts or info.prompts)
        model = info.clip_fingerprint, info.dtype
        same = (other for other in others if (other.clip_fingerprint, other.dtype) == model)
        if (other := next(same, None)) is not None:
            retriever = other.with_prompts(prompts, frames=info.frames)
        else:
            clip = _existing(directory, "--clip", clip or info.clip)
            if clip is None:
                raise UserError(f"{directory}: does not name its CLIP; give --clip=FILE")
            retriever = load(clip, prompts, frames=info.frames, dtype=info.dtype)
    return Searcher(index, retriever)


def _existing(
    directory: str | os.PathLike, option: str, path: str | os.PathLike
) -> str | os.PathLike | None:
    """The path of a file of an index; None for ""."""
    if path and not hub.is_name(path) and not epath.Path(path).exists():
        raise UserError(f"{path}: missing, but {directory} was made with it; give {option}=FILE")
    return path or None


def check_model(directory: str | os.PathLike, stored: IndexInfo, retriever: Retriever) -> None:
    """Raises UserError, naming both models, where another one made an index."""
    if stored.clip_fingerprint != retriever.clip_fingerprint:
        raise UserError(
            f"{directory}: was made with the CLIP {stored.clip_name}, not with "
            f"{retriever.clip_name}; give that --clip, or another --index for a new one"
        )
    own = stored.method, stored.prompts_fingerprint, stored.frames
    other = retriever.method.name, retriever.prompts_fingerprint, retriever.frames
    if own[1:] != other[1:]:
        raise UserError(
            f"{directory}: was made with {_describe(*own, stored.prompts)}, not with "
            f"{_describe(*other)}; give those --prompts, or another --index for a new one"
        )


def _describe(method: str, fingerprint: str, frames: int, path: str = "") -> str:
    prompts = " ".join(filter(None, (f"{method} prompts", path, f"({fingerprint[:12]})")))
    return f"{prompts if fingerprint else 'no prompts'} and {frames} frames a clip"


def read_image(path: str | os.PathLike) -> np.ndarray:
    """uint8 [height, width, 3] of a picture, upright.

    Raises:
        UserError: it cannot be read.
    """
    from vop_jax.video.images import decode_picture  # late: PIL

    try:
        with open(path, "rb") as file:
            return decode_picture(file)
    except FileNotFoundError:
        raise UserError(f"{os.fspath(path)}: no such file") from None
    except (OSError, VideoError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{os.fspath(path)}: {reason}") from None
