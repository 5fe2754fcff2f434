"""What the page shows beside the results of a query: files, folders, neighbours of a moment."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Annotated, Literal

import anyio
from fastapi import HTTPException, Query
from pydantic import BaseModel, Field

from vop_jax.errors import UserError
from vop_jax.serve import schema
from vop_jax.serve.media import displayable

FOLDERS = 50  # suggestions

router = schema.Router()


class LibraryFile(BaseModel):
    """A video of the index."""

    file_id: int
    name: Annotated[schema.Text, Field(description="relative to the indexed folder")]
    start: Annotated[float, Field(description="seconds: 0")] = 0.0
    end: Annotated[float, Field(description="seconds: its length")]
    modified: Annotated[float, Field(description="Unix time of its last change")]
    moments: Annotated[int, Field(description="without the whole clip")]
    missing: Annotated[bool, Field(description="whether the video file is gone")]


class LibraryPage(BaseModel):
    """Some of the videos that pass the filters."""

    total: Annotated[int, Field(description="number of videos that pass them")]
    files: list[LibraryFile]


class Moment(BaseModel):
    """A moment of a video, in seconds."""

    start: float
    end: float


class NeighboursResponse(BaseModel):
    """The moments before and after a moment."""

    number: Annotated[int, Field(description="of the moment, from 1; 0: the whole clip")]
    count: Annotated[int, Field(description="moments of the video, without the whole clip")]
    previous: Moment | None
    next: Moment | None


@contextlib.contextmanager
def _failing(status: int) -> Iterator[None]:
    """Errors get this status instead of 400."""
    try:
        yield
    except UserError as error:
        raise HTTPException(status, str(error)) from None


@router.get("/api/files")
async def files(
    searcher: schema.IndexOfQuery,
    filters: schema.Filters,
    order: Annotated[Literal["newest", "folder"], Query()] = "newest",
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    k: schema.Count = 24,
) -> LibraryPage:
    """The videos of an index, newest first or by folder."""

    def read() -> LibraryPage:
        folder = searcher.index.folder
        total, found = searcher.index.list_files(order, offset, k, **filters)
        rows = [
            LibraryFile(
                file_id=file.id,
                name=file.path,
                end=file.end,
                modified=file.modified,
                moments=file.moments,
                missing=schema.is_missing(folder, file.path),
            )
            for file in found
        ]
        return LibraryPage(total=total, files=rows)

    with _failing(503):  # the filters were checked before: the index is at fault
        return await anyio.to_thread.run_sync(read)


@router.get("/api/folders")
async def folders(
    searcher: schema.IndexOfQuery,
    prefix: Annotated[str, Query(max_length=1000, description="beginning of a path")] = "",
) -> list[schema.Text]:
    """Folders inside the indexed one whose path continues a prefix."""
    prefix = displayable(prefix)
    with _failing(503):
        return await anyio.to_thread.run_sync(searcher.index.list_folders, prefix, FOLDERS)


@router.get("/api/neighbours")
async def neighbours(
    searcher: schema.IndexOfQuery,
    file_id: schema.FileOfQuery,
    start: schema.Bound,
    end: schema.Bound,
) -> NeighboursResponse:
    """The moments before and after a moment."""
    await schema.indexed_file(searcher, file_id)
    call = functools.partial(searcher.index.neighbours, file_id, start, end)
    with _failing(404):
        found = await anyio.to_thread.run_sync(call)
    previous, next_ = (
        Moment(start=segment[0], end=segment[1]) if segment else None
        for segment in (found.previous, found.next)
    )
    return NeighboursResponse(number=found.number, count=found.count, previous=previous, next=next_)
