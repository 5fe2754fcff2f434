"""The server: one page, and what it asks for."""

import asyncio
import contextlib
import dataclasses
import html
import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import vop_jax
from vop_jax.errors import UserError, VideoError
from vop_jax.serve import api
from vop_jax.serve.executor import Work
from vop_jax.serve.library import Library
from vop_jax.serve.media import Gone
from vop_jax.serve.middleware import Guard, error
from vop_jax.serve.sandbox import Busy, Sandbox
from vop_jax.serve.schemas import Health

PAGE = StaticFiles(directory=os.path.join(os.path.dirname(__file__), "static"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        token: that must be given; "" if none.
        max_upload: bytes.
        max_seconds: of an uploaded video.
        hosts: names that requests may be addressed to; () for any. Where only this machine is to
            reach it, a page of another site could else get at it by a name of its own.
        names: of those, what a proxy in front is called.
        workers: processes that decode.
        decode_seconds: that one file may take.
    """

    token: str = ""
    max_upload: int = 200 << 20
    max_seconds: float = 600.0
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    names: tuple[str, ...] = ()
    workers: int = 2
    decode_seconds: float = 60.0


def make_app(library: Library, settings: Settings) -> FastAPI:
    """The app; its end closes the indexes."""
    sandbox = Sandbox(settings.workers, seconds=settings.decode_seconds)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(sandbox.close)
        for searcher in library.values():
            searcher.index.close()

    app = FastAPI(
        title="vop_jax",
        description="Finds videos, and moments of them, by what they show.",
        version=vop_jax.__version__,
        docs_url=None,  # FastAPI's own load from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.served = api.Served(library, Work(sandbox), settings.max_seconds)
    app.include_router(api.router)
    pages = api.Router()
    pages.add_api_route("/healthz", _health, response_model=Health)
    pages.add_api_route("/", _page, include_in_schema=False)
    pages.add_api_route("/docs", _docs, include_in_schema=False)
    app.include_router(pages)
    app.mount("/static", PAGE)
    _say_errors(app)
    app.add_middleware(
        Guard,
        token=settings.token,
        hosts=settings.hosts,
        names=settings.names,
        max_upload=settings.max_upload,
    )
    return app


async def _health() -> Health:
    """Whether the server answers."""
    return Health(status="ok")


async def _page(request: Request) -> Response:
    return await PAGE.get_response("page.html", request.scope)


def _docs(request: Request) -> HTMLResponse:
    """What there is to ask for, without anything from elsewhere."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, about in methods.items():
            named = [
                p["name"] + ("" if p["required"] else "?") for p in about.get("parameters", [])
            ]
            named += ["file (multipart)"] if "requestBody" in about else []
            cells = (method.upper(), path, ", ".join(named), about.get("description", ""))
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return HTMLResponse(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>vop_jax: API</title>'
        '<h1>API</h1><p>The whole schema: <a href="openapi.json">openapi.json</a></p>'
        f"<table><tr><th>Method<th>Path<th>Parameters<th>Answer</tr>{body}</table></html>"
    )


def _say_errors(app: FastAPI) -> None:
    """One line each, and nothing of the inside."""

    async def invalid(request: Request, wrong: Any) -> Response:
        lines = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in wrong.errors()]
        return error(422, "; ".join(lines))

    async def http(request: Request, wrong: Any) -> Response:
        return error(wrong.status_code, wrong.detail, dict(wrong.headers or {}))

    def status(code: int, headers: dict[str, str] | None = None) -> Any:
        async def answer(request: Request, wrong: Exception) -> Response:
            return error(code, str(wrong) or "the server is busy; try again", headers)

        return answer

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(UserError, status(400))
    app.add_exception_handler(VideoError, status(422))
    app.add_exception_handler(Gone, status(404))
    app.add_exception_handler(Busy, status(503, {"Retry-After": "2"}))
