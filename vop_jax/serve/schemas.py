"""What the API says, as its OpenAPI schema describes it."""

import math
import os
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field

from vop_jax.search.index import Hit
from vop_jax.search.searcher import Searcher
from vop_jax.serve.media import displayable

Name = Annotated[str, BeforeValidator(displayable)]


class Error(BaseModel):
    """What was wrong with a request."""

    error: Annotated[str, Field(description="one line")]


class About(BaseModel):
    """An index that is served."""

    name: str
    method: Annotated[Name, Field(description="of the prompts; zero_shot: plain CLIP")]
    clip: Name
    folder: Annotated[Name, Field(description="of the videos")]
    files: int
    moments: int
    captions: int
    frames: Annotated[int, Field(description="that the model sees of a clip or a moment")]


class Found(BaseModel):
    """A moment of a video, or a caption."""

    file_id: Annotated[int, Field(description="of the video; 0: a caption of no indexed one")]
    name: Annotated[Name, Field(description="of the video, in the indexed folder")]
    score: Annotated[float, Field(description="cosine of the angle to the query")]
    start: Annotated[float, Field(description="seconds")]
    end: Annotated[float | None, Field(description="seconds; null of a caption: to the end")]
    caption: Name
    missing: Annotated[bool, Field(description="whether the video is gone")]


class Answer(BaseModel):
    """What a search found, best first."""

    query: Annotated[Name, Field(description="the text, or the name of the upload")]
    cut: Annotated[bool, Field(description="whether the text is longer than the model reads")]
    hits: list[Found]


class Explanation(BaseModel):
    """How near a query is to each frame of a moment."""

    seconds: list[float]
    scores: list[float]


class Health(BaseModel):
    """That the server answers."""

    status: str


def about(name: str, searcher: Searcher) -> About:
    """An index as it is now."""
    info, counts = searcher.index.info, searcher.index.counts()
    return About(
        name=name,
        method=info.method,
        clip=info.clip_name,
        folder=searcher.index.folder,
        files=counts["files"],
        moments=counts["moments"],
        captions=counts["captions"],
        frames=info.frames,
    )


def found(searcher: Searcher, hits: Sequence[Hit]) -> list[Found]:
    """Hits, with what has become of their files."""
    folder = searcher.index.folder
    return [
        Found(
            file_id=hit.file_id,
            name=hit.path,
            score=hit.score,
            start=hit.start,
            end=None if math.isinf(hit.end) else hit.end,
            caption=hit.caption,
            missing=bool(hit.path) and not os.path.isfile(os.path.join(folder, hit.path)),
        )
        for hit in hits
    ]
