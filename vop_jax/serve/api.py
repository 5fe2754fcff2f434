"""The JSON API, and the videos themselves: a handler and a response type for each path."""

import contextlib
import dataclasses
import email.utils
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import anyio
import numpy as np
from fastapi import APIRouter, Depends, File, HTTPException, Path, Query, Request, UploadFile
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, Field

from vop_jax.errors import UserError, VideoError
from vop_jax.search import listing, results
from vop_jax.search.catalog import IndexedFile
from vop_jax.search.query import Hit, checked_min_score, make_filter
from vop_jax.search.searcher import Searcher
from vop_jax.serve import media
from vop_jax.serve.executor import Executor
from vop_jax.serve.media import displayable
from vop_jax.video.stream import frame_rates

MAX_HITS = 100
MAX_QUERY = 2000  # characters
MAX_TEXTS = 100  # in one request
FILES = {  # of results: the media type of each format
    "csv": "text/csv; charset=utf-8",
    "otio": "application/vnd.opentimelineio+json",
}

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
router = Router(responses={code: {"model": ErrorResponse} for code in STATUSES})


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
IN_FILES: dict[int | str, dict[str, Any]] = {
    200: {"content": {media_type.partition(";")[0]: {} for media_type in FILES.values()}}
}


@router.get("/api/indexes")
def indexes(services: ServicesOf) -> list[IndexSummary]:
    """The served indexes; one whose folder is gone is left out."""
    summaries, reason = [], ""
    for name, searcher in services.library.items():
        try:
            info = searcher.index.info
            summary = IndexSummary(
                name=name,
                method=info.method,
                clip=info.clip_name,
                folder=searcher.index.folder,
                frames=info.frames,
                **searcher.index.counts(),  # `failed` files are left out
            )
            summaries.append(summary)
        except UserError as error:
            reason = str(error)
    if not summaries:
        raise HTTPException(503, reason)
    return summaries


@router.get("/api/search", response_model=SearchResponse, responses=IN_FILES)
async def search(
    searcher: IndexOfQuery,
    services: ServicesOf,
    filters: Filters,
    q: QueryText,
    k: Count = 10,
    min_score: MinScore = "auto",
    format: Format = "json",
) -> SearchResponse | Response:
    """Moments that show what a text describes."""
    filters["min_score"] = checked_min_score(min_score)
    (found,) = await _search_texts(services, searcher, [q], k, **filters)
    return found if format == "json" else await _file_of([found], format, services, searcher)


@router.post("/api/search/texts", response_model=list[SearchResponse], responses=IN_FILES)
async def search_texts(
    searcher: IndexOfQuery,
    services: ServicesOf,
    filters: Filters,
    body: TextQueries,
    k: Count = 10,
    min_score: MinScore = "auto",
    format: Format = "json",
) -> list[SearchResponse] | Response:
    """Moments that show what each of several texts describes."""
    filters["min_score"] = checked_min_score(min_score)
    found = await _search_texts(services, searcher, body.queries, k, **filters)
    return found if format == "json" else await _file_of(found, format, services, searcher)


@router.post("/api/search/video", response_model=SearchResponse, responses=IN_FILES)
async def search_by_video(
    searcher: IndexOfQuery,
    services: ServicesOf,
    filters: Filters,
    file: Upload,
    k: Count = 10,
    to: Literal["videos", "captions"] = "videos",
    format: Format = "json",
) -> SearchResponse | Response:
    """Moments that resemble a video, or captions that describe it."""
    if format == "otio" and to == "captions":
        raise UserError("format=otio: a timeline of moments; not with to=captions")
    retriever, limit = searcher.retriever, services.max_seconds
    pixels = await _decode_upload(services, file, media.uploaded_video, retriever.frame_spec, limit)
    (vector,) = await services.executor.run_model(retriever.embed_frames, pixels[None])
    return await _nearest_to(services, searcher, file, vector, k, format, to=to, **filters)


@router.post("/api/search/image", response_model=SearchResponse, responses=IN_FILES)
async def search_by_image(
    searcher: IndexOfQuery,
    services: ServicesOf,
    filters: Filters,
    file: Upload,
    k: Count = 10,
    format: Format = "json",
) -> SearchResponse | Response:
    """Moments that resemble a picture."""
    retriever = searcher.retriever
    pixels = await _decode_upload(services, file, media.uploaded_image, retriever.frame_spec)
    (vector,) = await services.executor.run_model(retriever.embed_images, [pixels])
    return await _nearest_to(services, searcher, file, vector, k, format, **filters)


@router.get("/api/similar")
async def similar(
    searcher: IndexOfQuery,
    services: ServicesOf,
    filters: Filters,
    file_id: FileOfQuery,
    start: Bound,
    end: Bound,
    k: Count = 10,
) -> SearchResponse:
    """Moments of other videos that resemble a moment."""
    _, record = await indexed_file(searcher, file_id)
    call = listing.moment_vector, searcher.index, file_id, start, end
    try:
        vector = await services.executor.run_search(*call)
    except UserError as error:
        raise HTTPException(404, str(error)) from None
    (hits,) = await _hits(services, searcher, vector[None], k + 1, **filters)
    hits = [hit for hit in hits if hit.file_id != file_id][:k]
    return SearchResponse(query=record.path, cut=False, found=bool(hits), hits=hits)


@router.get("/api/explain")
async def explain(
    searcher: IndexOfQuery,
    services: ServicesOf,
    q: QueryText,
    file_id: FileOfQuery,
    start: Seconds = 0.0,
    end: Annotated[float | None, Query(gt=0, le=1e7, allow_inf_nan=False)] = None,
) -> Explanation:
    """The similarity of a text to each frame of a moment."""
    if end is not None and end <= start:
        raise UserError(f"end={end:g}: must be more than start={start:g}")
    vector = await services.executor.query_vector(searcher, _not_empty(q))
    folder, record = await indexed_file(searcher, file_id)
    retriever = searcher.retriever
    segment = start, math.inf if end is None else end
    call = media.moment_frames, folder, record, retriever.frame_spec, *segment
    with _naming(record):
        pixels, seconds = await services.executor.decode(*call)
    (vectors,) = await services.executor.run_model(retriever.embed_each_frame, pixels[None])
    return Explanation(seconds=seconds, scores=[float(score) for score in vectors @ vector])


@router.get(
    "/api/thumbnail/{index}/{file_id}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}},
)
async def thumbnail(
    request: Request, searcher: IndexOfPath, services: ServicesOf, file_id: FileId, t: Seconds = 0.0
) -> Response:
    """A small picture of a video at a time."""
    folder, record = await indexed_file(searcher, file_id)
    with _naming(record):
        # A cached picture is not sent when its file is gone.
        await anyio.to_thread.run_sync(lambda: media.open_indexed(folder, record).close())
        call = media.thumbnail, folder, record, round(t, 2)
        picture = await services.executor.thumbnail(*call)
    headers = {
        "Cache-Control": "private, max-age=300",
        "ETag": f'"{hashlib.md5(picture, usedforsecurity=False).hexdigest()}"',
        "Last-Modified": email.utils.formatdate(record.mtime / 1e9, usegmt=True),
    }
    response = Response(picture, media_type="image/jpeg", headers=headers)
    return media.not_modified(response, request.scope) or response


@router.get(
    "/media/{index}/{file_id}",
    response_class=Response,
    responses={
        200: {"content": {"video/*": {}, "application/octet-stream": {}}},
        206: {"description": "the requested range"},
    },
)
async def video(searcher: IndexOfPath, file_id: FileId) -> Response:
    """A video, or ranges of it."""
    folder, record = await indexed_file(searcher, file_id)
    with _naming(record):
        file = await anyio.to_thread.run_sync(media.open_indexed, folder, record)
    return media.VideoResponse(file, record.path)


def _not_empty(query: str) -> str:
    if not query.strip():
        raise UserError("q: the query is empty; say what to look for")
    return query


async def _search_texts(
    services: Services, searcher: Searcher, queries: list[str], k: int, **filters: Any
) -> list[SearchResponse]:
    """The results of each text, from one batch of the model and one pass over the vectors."""
    for query in queries:
        _not_empty(query)
    vectors = await services.executor.query_vectors(searcher, queries)
    hits = await _hits(services, searcher, vectors, k, **filters)
    cut = [bool(searcher.retriever.count_truncated([query])) for query in queries]
    return [
        SearchResponse(query=query, cut=cut, found=bool(own), hits=own)
        for query, cut, own in zip(queries, cut, hits, strict=True)
    ]


async def _nearest_to(
    services: Services,
    searcher: Searcher,
    upload: UploadFile,
    vector: np.ndarray,
    k: int,
    format: str,
    **filters: Any,
) -> SearchResponse | Response:
    """The results of an upload by its vector [E]."""
    (hits,) = await _hits(services, searcher, vector[None], k, **filters)
    found = SearchResponse(query=upload.filename or "", cut=False, found=bool(hits), hits=hits)
    return found if format == "json" else await _file_of([found], format, services, searcher)


async def _hits(
    services: Services, searcher: Searcher, vectors: np.ndarray, k: int, **filters: Any
) -> list[list[SearchHit]]:
    """Of each vector [N, E]."""

    def find() -> list[list[SearchHit]]:
        found = searcher.index.search(vectors, k, **filters)
        ids = (hit.file_id for hits in found for hit in hits)
        folder, times = listing.modified(searcher.index, ids)
        return [[search_hit(folder, h, times.get(h.file_id)) for h in hits] for hits in found]

    try:
        return await services.executor.run_search(find)
    except UserError as error:  # the request was checked before: the index is at fault
        raise HTTPException(503, str(error)) from None


async def _file_of(
    responses: list[SearchResponse], format: str, services: Services, searcher: Searcher
) -> Response:
    """Results as a file in a format of `FILES`."""
    folder = await anyio.to_thread.run_sync(lambda: searcher.index.folder)
    found = []
    for response in responses:
        hits = [hit.model_dump() for hit in response.hits]
        paths = [hit["name"] and os.path.join(folder, hit["name"]) for hit in hits]
        scores = [round(hit["score"], 4) for hit in hits]
        columns = zip(hits, paths, scores, strict=True)
        rows = [{**hit, "path": path, "score": score} for hit, path, score in columns]
        found.append(results.Result(response.query, rows))
    if format == "csv":
        content = results.as_csv(found)
    else:
        rates = await services.executor.decode(frame_rates, results.moment_paths(found))
        content = results.as_timeline(found, rates)
    headers = {"Content-Disposition": f"attachment; filename=search.{format}"}
    return Response(f"{content}\n", media_type=FILES[format], headers=headers)


def search_hit(folder: str, hit: Hit, changed: float | None = None) -> SearchHit:
    """A hit as the API describes it, and whether its file still exists in the folder."""
    return SearchHit(
        file_id=hit.file_id,
        name=hit.path,
        score=hit.score,
        start=hit.start,
        end=None if math.isinf(hit.end) else hit.end,
        caption=hit.caption,
        modified=changed,
        missing=bool(hit.path) and is_missing(folder, hit.path),
    )


def is_missing(folder: str, path: str) -> bool:
    """Whether a file of the indexed folder is gone."""
    return not os.path.isfile(os.path.join(folder, path))


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


@contextlib.contextmanager
def _naming(record: IndexedFile) -> Iterator[None]:
    """Errors begin with the path of the file."""
    try:
        yield
    except VideoError as error:
        raise type(error)(f"{record.path}: {error}") from None


async def _decode_upload(
    services: Services, upload: UploadFile, call: Callable, *arguments: Any
) -> Any:
    """The result of a decoding call on an uploaded file."""
    with tempfile.TemporaryDirectory(prefix="vop_jax_upload_") as folder:
        path = os.path.join(folder, "upload")

        def copy() -> None:
            with open(path, "wb") as target:
                shutil.copyfileobj(upload.file, target)

        await anyio.to_thread.run_sync(copy)
        try:
            return await services.executor.decode(call, path, *arguments)
        except VideoError as error:
            raise HTTPException(400, f"{upload.filename or 'the upload'}: {error}") from None
