"""The JSON API, and the videos themselves."""

import dataclasses
import email.utils
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Annotated, Any, BinaryIO, Literal

import anyio
import numpy as np
from fastapi import APIRouter, Depends, File, HTTPException, Path, Query, Request, UploadFile
from fastapi.responses import Response

from vop_jax.errors import UserError, VideoError
from vop_jax.search.catalog import IndexedFile
from vop_jax.search.query import make_filter
from vop_jax.search.searcher import Searcher
from vop_jax.serve import decoders, schemas
from vop_jax.serve.executor import Work
from vop_jax.serve.library import Library
from vop_jax.serve.media import VideoResponse, not_modified, open_indexed
from vop_jax.serve.schemas import About, Answer, Error, Explanation

MOST = 100  # hits
LONGEST = 2000  # characters of a query


@dataclasses.dataclass(frozen=True)
class Served:
    """What the handlers work with; `max_seconds` of an uploaded video."""

    library: Library
    work: Work
    max_seconds: float


class Router(APIRouter):
    """Answers HEAD wherever it answers GET."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().add_api_route(path, endpoint, **options)
        if "GET" in (options.get("methods") or ["GET"]):
            head = {"methods": ["HEAD"], "include_in_schema": False}
            super().add_api_route(path, endpoint, **options | head)


router = Router(
    responses={
        code: {"model": Error} for code in (400, 401, 403, 404, 405, 408, 413, 415, 416, 422, 503)
    }
)


def _served(request: Request) -> Served:
    return request.app.state.served


def _named(request: Request, name: str) -> Searcher:
    library = _served(request).library
    if not name:
        return next(iter(library.values()))
    if name not in library:
        raise HTTPException(404, f"index={name!r}: there are {', '.join(library)}")
    return library[name]


Name = Annotated[str, Query(max_length=200, description="of the index; none: the first")]


def _of_query(request: Request, index: Name = "") -> Searcher:
    return _named(request, index)


def _of_path(request: Request, index: Annotated[str, Path(max_length=200)]) -> Searcher:
    return _named(request, index)


def _filters(
    folder: Annotated[str, Query(max_length=1000, description="part of the indexed one")] = "",
    since: Annotated[str, Query(max_length=40, description="files changed then or later")] = "",
    until: Annotated[str, Query(max_length=40, description="files changed then or before")] = "",
) -> dict[str, Any]:
    given: dict[str, Any] = {
        "folder": folder or None,
        "since": since or None,
        "until": until or None,
    }
    make_filter(**given)  # what is wrong with them is told before the model is asked
    return given


Serving = Annotated[Served, Depends(_served)]
Chosen = Annotated[Searcher, Depends(_of_query)]
ChosenByPath = Annotated[Searcher, Depends(_of_path)]
Filters = Annotated[dict[str, Any], Depends(_filters)]
Text = Annotated[str, Query(max_length=LONGEST, description="what to look for")]
Count = Annotated[int, Query(ge=1, le=MOST, description="how many")]
FileId = Annotated[int, Path(ge=1, lt=2**63)]
Seconds = Annotated[float, Query(ge=0, le=1e7, allow_inf_nan=False)]
Upload = Annotated[UploadFile, File()]


@router.get("/api/indexes")
def indexes(served: Serving) -> list[About]:
    """Which indexes there are; one that is gone is left out."""
    found, gone = [], ""
    for name, searcher in served.library.items():
        try:
            found.append(schemas.about(name, searcher))
        except UserError as error:
            gone = str(error)
    if not found:
        raise HTTPException(503, gone)
    return found


@router.get("/api/search")
async def search(
    searcher: Chosen, served: Serving, filters: Filters, q: Text, k: Count = 10
) -> Answer:
    """What shows what a text says."""
    vector = await served.work.query(searcher, _said(q))
    cut = bool(searcher.retriever.count_cut([q]))
    return await _nearest(served, searcher, vector, k, q, cut=cut, **filters)


@router.post("/api/search/video")
async def search_by_video(
    searcher: Chosen,
    served: Serving,
    filters: Filters,
    file: Upload,
    k: Count = 10,
    to: Literal["videos", "captions"] = "videos",
) -> Answer:
    """What is like a video, or the captions that describe it."""
    retriever = searcher.retriever
    given = decoders.uploaded_video, retriever.frame_spec, served.max_seconds
    pixels = await _decoded(served, file, *given)
    vector = (await served.work.model(retriever.embed_frames, pixels[None]))[0]
    return await _nearest(served, searcher, vector, k, file.filename or "", to=to, **filters)


@router.post("/api/search/image")
async def search_by_image(
    searcher: Chosen, served: Serving, filters: Filters, file: Upload, k: Count = 10
) -> Answer:
    """What is like a picture."""
    retriever = searcher.retriever
    pixels = await _decoded(served, file, decoders.uploaded_image, retriever.frame_spec)
    vector = (await served.work.model(retriever.embed_images, [pixels]))[0]
    return await _nearest(served, searcher, vector, k, file.filename or "", **filters)


@router.get("/api/explain")
async def explain(
    searcher: Chosen,
    served: Serving,
    q: Text,
    file_id: Annotated[int, Query(ge=1, lt=2**63)],
    start: Seconds = 0.0,
    end: Annotated[float | None, Query(gt=0, le=1e7, allow_inf_nan=False)] = None,
) -> Explanation:
    """How near a text is to each frame of a moment."""
    if end is not None and end <= start:
        raise UserError(f"end={end:g}: must be more than start={start:g}")
    vector = await served.work.query(searcher, _said(q))
    folder, record = await _file(searcher, file_id)
    retriever = searcher.retriever
    last = float("inf") if end is None else end
    call = decoders.moment, folder, record, retriever.frame_spec, start, last
    try:
        pixels, seconds = await served.work.decode(*call)
    except VideoError as error:
        raise type(error)(f"{record.path}: {error}") from None
    each = (await served.work.model(retriever.embed_each_frame, pixels[None]))[0]
    return Explanation(seconds=seconds, scores=[float(score) for score in each @ vector])


@router.get(
    "/api/thumbnail/{index}/{file_id}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}},
)
async def thumbnail(
    request: Request, searcher: ChosenByPath, served: Serving, file_id: FileId, t: Seconds = 0.0
) -> Response:
    """A small picture of a video at a time."""
    folder, record = await _file(searcher, file_id)
    # One that is kept is not shown where the file is gone.
    await anyio.to_thread.run_sync(lambda: _open(folder, record).close())
    try:
        picture = await served.work.picture(decoders.thumbnail, folder, record, round(t, 2))
    except VideoError as error:
        raise type(error)(f"{record.path}: {error}") from None
    headers = {
        "Cache-Control": "private, max-age=300",
        "ETag": f'"{hashlib.md5(picture, usedforsecurity=False).hexdigest()}"',
        "Last-Modified": email.utils.formatdate(record.mtime / 1e9, usegmt=True),
    }
    response = Response(picture, media_type="image/jpeg", headers=headers)
    return not_modified(response, request.scope) or response


@router.get(
    "/media/{index}/{file_id}",
    response_class=Response,
    responses={
        200: {"content": {"video/*": {}, "application/octet-stream": {}}},
        206: {"description": "the range that was asked for"},
    },
)
async def media(searcher: ChosenByPath, file_id: FileId) -> Response:
    """A video, or ranges of it."""
    folder, record = await _file(searcher, file_id)
    file = await anyio.to_thread.run_sync(_open, folder, record)
    return VideoResponse(file, record.path)


def _said(query: str) -> str:
    if not query.strip():
        raise UserError("q: the query is empty; say what to look for")
    return query


async def _nearest(
    served: Served,
    searcher: Searcher,
    vector: np.ndarray,
    k: int,
    query: str,
    cut: bool = False,
    **filters: Any,
) -> Answer:
    def find() -> list[schemas.Found]:
        return schemas.found(searcher, searcher.nearest(vector, k, **filters))

    try:
        hits = await served.work.search(find)
    except UserError as error:  # the question was looked at before: it is the index
        raise HTTPException(503, str(error)) from None
    return Answer(query=query, cut=cut, hits=hits)


async def _file(searcher: Searcher, file_id: int) -> tuple[str, IndexedFile]:
    """(indexed folder, what is known of a file in it) of a video that an index holds."""
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


def _open(folder: str, record: IndexedFile) -> BinaryIO:
    """See `open_indexed`."""
    try:
        return open_indexed(folder, record)
    except VideoError as error:
        raise type(error)(f"{record.path}: {error}") from None


async def _decoded(served: Served, upload: UploadFile, call: Callable, *arguments: Any) -> Any:
    """What a decoder makes of an upload."""
    with tempfile.TemporaryDirectory(prefix="vop_jax_upload_") as folder:
        path = os.path.join(folder, "upload")

        def copy() -> None:
            with open(path, "wb") as target:
                shutil.copyfileobj(upload.file, target)

        await anyio.to_thread.run_sync(copy)
        try:
            return await served.work.decode(call, path, *arguments)
        except VideoError as error:
            raise HTTPException(400, f"{upload.filename or 'the upload'}: {error}") from None
