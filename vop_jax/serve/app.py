"""The ASGI application: served indexes, routes of page and API, error responses."""

import contextlib
import html
import os
import pathlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import vop_jax
from vop_jax.errors import UserError, VideoError
from vop_jax.search.searcher import open_searcher
from vop_jax.search.stores import client
from vop_jax.serve import api, browse, monitoring, reindex, schema
from vop_jax.serve.executor import Busy, Executor
from vop_jax.serve.media import FileGone
from vop_jax.serve.middleware import SafetyMiddleware, Settings, error_response

STATIC = StaticFiles(directory=os.path.join(os.path.dirname(__file__), "static"))
pages = schema.Router()


def open_library(places: Sequence[str], clip: str | None = None) -> schema.Library:
    """Opens indexes by name; those of one CLIP share it in memory.

    An index has the name of its folder or collection, as a URL may contain it; a second one gets
    NAME-2.

    Args:
        places: folders of indexes, or addresses, see `open_index`.
        clip: the CLIP file, if it has moved.

    Raises:
        UserError: an index does not exist, or its model is gone.
    """
    library: schema.Library = {}
    for place in places:
        folder = pathlib.Path(place).resolve().name
        if client.is_server(place):
            _, folder = client.split(place)
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder).strip("-.") or "index"
        name, number = stem, 1
        while name in library:
            number += 1
            name = f"{stem}-{number}"
        opened = (searcher.retriever for searcher in library.values())
        library[name] = open_searcher(place, clip=clip, others=opened, fresh=False)
    return library


def make_app(library: schema.Library, settings: Settings) -> FastAPI:
    """The application; its end closes the indexes."""
    executor = Executor(settings.workers, seconds=settings.decode_seconds)
    reindexer = reindex.Reindexer(settings.clip, settings.workers) if settings.token else None
    metrics = monitoring.Metrics() if settings.metrics else None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        executor.start()
        yield
        if reindexer:
            await reindexer.close()
        await executor.close()
        for searcher in library.values():
            searcher.index.close()

    app = FastAPI(
        title="vop_jax",
        description="Finds videos, and moments of them, by what they show.",
        version=vop_jax.__version__,
        docs_url=None,  # FastAPI's own pages load scripts from other sites
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.services = schema.Services(library, executor, settings.max_seconds)
    app.state.reindexer, app.state.metrics = reindexer, metrics
    for router in (api.router, browse.router, reindex.router, monitoring.router, pages):
        app.include_router(router)
    app.mount("/static", STATIC)
    _handle_errors(app)
    app.add_middleware(SafetyMiddleware, settings=settings)
    if metrics or settings.log != "none":  # last, so that it sees what the other one refuses
        app.add_middleware(monitoring.MonitoringMiddleware, log=settings.log, metrics=metrics)
    return app


@pages.get("/", include_in_schema=False)
async def _page(request: Request) -> Response:
    return await STATIC.get_response("page.html", request.scope)


@pages.get("/docs", include_in_schema=False)
def _docs(request: Request) -> HTMLResponse:
    """A table of the API that loads nothing else."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, operation in methods.items():
            parameters = [
                p["name"] + ("" if p["required"] else "?") for p in operation.get("parameters", [])
            ]
            body = operation.get("requestBody", {}).get("content", {})
            parameters += ["file (multipart)"] if "multipart/form-data" in body else []
            parameters += ["queries (JSON)"] if "application/json" in body else []
            cells = (method.upper(), path, ", ".join(parameters), operation.get("description", ""))
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return HTMLResponse(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>vop_jax: API</title>'
        '<h1>API</h1><p>The whole schema: <a href="openapi.json">openapi.json</a></p>'
        f"<table><tr><th>Method<th>Path<th>Parameters<th>Response</tr>{body}</table></html>"
    )


def _handle_errors(app: FastAPI) -> None:
    """Every error becomes one line, without details of the server."""

    async def invalid(request: Request, error: Any) -> Response:
        lines = [
            f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()
        ]
        return error_response(422, "; ".join(lines))

    async def http(request: Request, error: Any) -> Response:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    def with_status(code: int, headers: dict[str, str] | None = None) -> Any:
        async def handler(request: Request, error: Exception) -> Response:
            return error_response(code, error, headers)

        return handler

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(UserError, with_status(400))
    app.add_exception_handler(VideoError, with_status(422))
    app.add_exception_handler(FileGone, with_status(404))
    app.add_exception_handler(Busy, with_status(503, {"Retry-After": "2"}))
