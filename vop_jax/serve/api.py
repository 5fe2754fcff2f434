"""The JSON API, and the videos themselves: a handler for each path."""

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
from fastapi import Depends, HTTPException, Query, Request, UploadFile
from fastapi.responses import Response

from vop_jax.errors import UserError, VideoError
from vop_jax.search import results, sources
from vop_jax.search.catalog import IndexedFile
from vop_jax.search.query import Hit, checked_min_score
from vop_jax.search.searcher import Searcher
from vop_jax.serve import media
from vop_jax.serve.schema import (
    STATUSES,
    Bound,
    Count,
    ErrorResponse,
    Explanation,
    FileId,
    FileOfQuery,
    Filters,
    Format,
    IndexOfPath,
    IndexOfQuery,
    IndexSummary,
    MinScore,
    QueryText,
    Router,
    SearchHit,
    SearchResponse,
    Seconds,
    Services,
    ServicesOf,
    TextQueries,
    Upload,
    indexed_file,
    is_missing,
)
from vop_jax.storage.files import is_remote
from vop_jax.video.stream import frame_rates

FILES = {  # of results: the media type of each format
    "csv": "text/csv; charset=utf-8",
    "otio": "application/vnd.opentimelineio+json",
}
IN_FILES: dict[int | str, dict[str, Any]] = {
    200: {"content": {media_type.partition(";")[0]: {} for media_type in FILES.values()}}
}

router = Router(responses={code: {"model": ErrorResponse} for code in STATUSES})


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


@dataclasses.dataclass
class Search:
    """What every search of moments is given, and how it answers."""

    searcher: IndexOfQuery
    services: ServicesOf
    filters: Filters
    k: Count = 10
    format: Format = "json"

    async def texts(self, queries: list[str], min_score: str) -> list[SearchResponse]:
        """The results of each text, from one batch of the model and one pass over the vectors."""
        minimum = checked_min_score(min_score)
        for query in queries:
            _not_empty(query)
        vectors = await self.services.executor.query_vectors(self.searcher, queries)
        hits = await self._hits(vectors, min_score=minimum)
        cut = [bool(self.searcher.retriever.count_truncated([query])) for query in queries]
        return [
            SearchResponse(query=query, cut=cut, found=bool(own), hits=own)
            for query, cut, own in zip(queries, cut, hits, strict=True)
        ]

    async def upload(self, file: UploadFile, vector: np.ndarray, **filters: Any) -> SearchResponse:
        """The results of an uploaded file, by its vector [E]."""
        (hits,) = await self._hits(vector[None], **filters)
        return SearchResponse(query=file.filename or "", cut=False, found=bool(hits), hits=hits)

    async def _hits(self, vectors: np.ndarray, **filters: Any) -> list[list[SearchHit]]:
        return await _hits(self.services, self.searcher, vectors, self.k, **self.filters, **filters)

    async def answer(
        self, found: SearchResponse | list[SearchResponse]
    ) -> SearchResponse | list[SearchResponse] | Response:
        """The results as JSON, or as a file in a format of `FILES`."""
        if self.format == "json":
            return found
        folder = await anyio.to_thread.run_sync(lambda: self.searcher.index.folder)
        rows = [
            results.Result(response.query, [_row(folder, hit) for hit in response.hits])
            for response in (found if isinstance(found, list) else [found])
        ]
        if self.format == "csv":
            content = results.as_csv(rows)
        else:
            rates = await self.services.executor.decode(frame_rates, results.moment_paths(rows))
            content = results.as_timeline(rows, rates)
        headers = {"Content-Disposition": f"attachment; filename=search.{self.format}"}
        return Response(f"{content}\n", media_type=FILES[self.format], headers=headers)


SearchOf = Annotated[Search, Depends()]


@router.get("/api/search", response_model=SearchResponse, responses=IN_FILES)
async def search(given: SearchOf, q: QueryText, min_score: MinScore = "auto") -> Any:
    """Moments that show what a text describes."""
    (found,) = await given.texts([q], min_score)
    return await given.answer(found)


@router.post("/api/search/texts", response_model=list[SearchResponse], responses=IN_FILES)
async def search_texts(given: SearchOf, body: TextQueries, min_score: MinScore = "auto") -> Any:
    """Moments that show what each of several texts describes."""
    return await given.answer(await given.texts(body.queries, min_score))


@router.post("/api/search/video", response_model=SearchResponse, responses=IN_FILES)
async def search_by_video(
    given: SearchOf, file: Upload, to: Literal["videos", "captions"] = "videos"
) -> Any:
    """Moments that resemble a video, or captions that describe it."""
    if given.format == "otio" and to == "captions":
        raise UserError("format=otio: a timeline of moments; not with to=captions")
    services, retriever = given.services, given.searcher.retriever
    call = media.uploaded_video, retriever.frame_spec, services.max_seconds
    pixels = await _decode_upload(services, file, *call)
    (vector,) = await services.executor.run_model(retriever.embed_frames, pixels[None])
    return await given.answer(await given.upload(file, vector, to=to))


@router.post("/api/search/image", response_model=SearchResponse, responses=IN_FILES)
async def search_by_image(given: SearchOf, file: Upload) -> Any:
    """Moments that resemble a picture."""
    services, retriever = given.services, given.searcher.retriever
    pixels = await _decode_upload(services, file, media.uploaded_image, retriever.frame_spec)
    (vector,) = await services.executor.run_model(retriever.embed_images, [pixels])
    return await given.answer(await given.upload(file, vector))


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
    call = searcher.index.moment_vector, file_id, start, end
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
        await anyio.to_thread.run_sync(media.check_unchanged, folder, record)
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
async def video(request: Request, searcher: IndexOfPath, file_id: FileId) -> Response:
    """A video, or ranges of it."""
    folder, record = await indexed_file(searcher, file_id)
    where = sources.locate(folder, record.path)
    with _naming(record):
        if is_remote(where):
            await anyio.to_thread.run_sync(media.check_unchanged, folder, record)
            response = media.RemoteVideoResponse(where, record, request.headers.get("range", ""))
            return media.not_modified(response, request.scope) or response
        file = await anyio.to_thread.run_sync(media.open_indexed, folder, record)
    return media.VideoResponse(file, record.path)


def _not_empty(query: str) -> str:
    if not query.strip():
        raise UserError("q: the query is empty; say what to look for")
    return query


async def _hits(
    services: Services, searcher: Searcher, vectors: np.ndarray, k: int, **filters: Any
) -> list[list[SearchHit]]:
    """Of each vector [N, E]."""

    def find() -> list[list[SearchHit]]:
        found = searcher.index.search(vectors, k, **filters)
        ids = (hit.file_id for hits in found for hit in hits)
        folder, times = searcher.index.modified(ids)
        return [[search_hit(folder, h, times.get(h.file_id)) for h in hits] for hits in found]

    try:
        return await services.executor.run_search(find)
    except UserError as error:  # the request was checked before: the index is at fault
        raise HTTPException(503, str(error)) from None


def _row(folder: str, hit: SearchHit) -> dict[str, Any]:
    """A hit as files of results have it."""
    path = hit.name and sources.locate(folder, hit.name)
    return hit.model_dump() | {"path": path, "score": round(hit.score, 4)}


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
