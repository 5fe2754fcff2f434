"""What requests and responses of the API consist of, and what handlers get from them."""

import dataclasses
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, File, HTTPException, Path, Query, Request, UploadFile
from pydantic import BaseModel, BeforeValidator, Field

from vop_jax.errors import UserError
from vop_jax.search import sources
from vop_jax.search.catalog import IndexedFile
from vop_jax.search.query import make_filter
from vop_jax.search.searcher import Searcher
from vop_jax.serve.executor import Executor
from vop_jax.serve.media import displayable
from vop_jax.storage.files import is_remote

MAX_HITS = 100
MAX_QUERY = 2000  # characters
MAX_TEXTS = 100  # in one request

Library = dict[str, Searcher]  # by name; the first one is the default


@dataclasses.dataclass(frozen=True)
class Services:
    """What the handlers work with.

    Attributes:
        max_seconds: of an uploaded video.
    """

    library: Library
    executor: Executor
    max_seconds: float


Text = Annotated[str, BeforeValidator(displayable)]


class ErrorResponse(BaseModel):
    """Why a request failed."""

    error: Annotated[str, Field(description="one line")]


class IndexSummary(BaseModel):
    """A served index."""

    name: str
    method: Annotated[Text, Field(description="of the prompts; zero_shot: plain CLIP")]
    clip: Text
    folder: Annotated[Text, Field(description="of the videos")]
    files: int
    moments: int
    captions: int
    frames: Annotated[int, Field(description="that the model sees of a clip or a moment")]


class SearchHit(BaseModel):
    """A moment of a video, or a caption."""

    file_id: Annotated[int, Field(description="of the video; 0: a caption of no indexed video")]
    name: Annotated[Text, Field(description="of the video, relative to the indexed folder")]
    score: Annotated[float, Field(description="cosine of the angle to the query")]
    start: Annotated[float, Field(description="seconds")]
    end: Annotated[float | None, Field(description="seconds; null: the end of the video")]
    caption: Text
    modified: Annotated[
        float | None, Field(description="Unix time of the video's last change; null: no video")
    ]
    missing: Annotated[bool, Field(description="whether the video file is gone")]


class SearchResponse(BaseModel):
    """The results of a search, best first."""

    query: Annotated[Text, Field(description="the text, or the name of the uploaded file")]
    cut: Annotated[bool, Field(description="whether the text was truncated for the model")]
    found: Annotated[bool, Field(description="whether any moment shows it; else no hits")]
    hits: list[SearchHit]


class TextQueries(BaseModel):
    """Texts to search for."""

    queries: Annotated[
        list[Annotated[str, Field(max_length=MAX_QUERY)]], Field(min_length=1, max_length=MAX_TEXTS)
    ]


class Explanation(BaseModel):
    """The similarity of a query to each frame of a moment."""

    seconds: list[float]
    scores: list[float]


class Router(APIRouter):
    """A router that answers HEAD wherever it answers GET."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().add_api_route(path, endpoint, **options)
        if "GET" in (options.get("methods") or ["GET"]):
            head = {"methods": ["HEAD"], "include_in_schema": False}
            super().add_api_route(path, endpoint, **options | head)


STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 416, 422, 503)


def _services(request: Request) -> Services:
    return request.app.state.services


def _searcher(request: Request, name: str) -> Searcher:
    library = _services(request).library
    if not name:
        return next(iter(library.values()))
    if name not in library:
        raise HTTPException(404, f"index={name!r}: not served; allowed are {', '.join(library)}")
    return library[name]


IndexName = Annotated[str, Query(max_length=200, description="of the index; the first if empty")]


def _searcher_of_query(request: Request, index: IndexName = "") -> Searcher:
    return _searcher(request, index)


def _searcher_of_path(request: Request, index: Annotated[str, Path(max_length=200)]) -> Searcher:
    return _searcher(request, index)


def _filters(
    folder: Annotated[str, Query(max_length=1000, description="inside the indexed folder")] = "",
    since: Annotated[str, Query(max_length=40, description="first date of change")] = "",
    until: Annotated[str, Query(max_length=40, description="last date of change")] = "",
) -> dict[str, Any]:
    filters: dict[str, Any] = {
        "folder": folder or None,
        "since": since or None,
        "until": until or None,
    }
    make_filter(**filters)  # a wrong filter is reported before the model runs
    return filters


ServicesOf = Annotated[Services, Depends(_services)]
IndexOfQuery = Annotated[Searcher, Depends(_searcher_of_query)]
IndexOfPath = Annotated[Searcher, Depends(_searcher_of_path)]
Filters = Annotated[dict[str, Any], Depends(_filters)]
QueryText = Annotated[str, Query(max_length=MAX_QUERY, description="what to look for")]
Count = Annotated[int, Query(ge=1, le=MAX_HITS, description="number of results")]
FileId = Annotated[int, Path(ge=1, lt=2**63)]
FileOfQuery = Annotated[int, Query(ge=1, lt=2**63)]
Bound = Annotated[float, Query(ge=0, le=1e7, allow_inf_nan=False, description="as in a result")]
Seconds = Annotated[float, Query(ge=0, le=1e7, allow_inf_nan=False)]
MinScore = Annotated[str, Query(max_length=40, description="of a hit: auto, none, or a cosine")]
Upload = Annotated[UploadFile, File()]
Format = Annotated[Literal["json", "csv", "otio"], Query(description="of the results")]


def is_missing(folder: str, path: str) -> bool:
    """Whether a file of the indexed folder is gone; not known of a remote one."""
    where = sources.locate(folder, path)
    return not is_remote(where) and not os.path.isfile(where)


async def indexed_file(searcher: Searcher, file_id: int) -> tuple[str, IndexedFile]:
    """(indexed folder, record of the file) of an indexed video."""
    try:
        folder = await anyio.to_thread.run_sync(lambda: searcher.index.folder)
    except UserError as error:
        raise HTTPException(503, str(error)) from None
    try:
        file = await anyio.to_thread.run_sync(searcher.index.file_of, file_id)
    except UserError as error:
        raise HTTPException(404, str(error)) from None
    if file.reason is not None:
        raise HTTPException(404, f"{file.path}: could not be read when it was indexed")
    return folder, file
