"""Protection of the server: hosts, token, foreign pages, sizes and times of requests, headers."""

import asyncio
import dataclasses
import hmac
import math
import urllib.parse
from typing import Any

import anyio
from absl import logging
from python_multipart.multipart import parse_options_header
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vop_jax.cli import printable
from vop_jax.serve.media import displayable

COOKIE = "token"
BODY = 64 << 10  # bytes of a request without an upload, and of the parts around an upload
JSON = {"/api/search/texts": 1 << 20}  # bytes of bodies that are parsed in memory
UPLOADS = 8  # at a time; bounds the disk space
UPLOAD_SECONDS = 600.0  # from the first byte to the response
UPLOAD_PAUSE = 30.0  # seconds without a byte of an upload
STREAMS = 64  # videos that are sent at a time; bounds the open files
CHARSETS = (b"utf-8", b"us-ascii")  # of the text parts of an upload
CLOSE = {"Connection": "close"}
# Starlette answers a wrong Range header as plain text; these lines replace it.
RANGES = {400: "Range: must be bytes=FIRST-LAST", 416: "Range: outside of the file"}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none';"
        " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        token: that requests must carry; "" if none.
        max_upload: bytes.
        max_seconds: of an uploaded video.
        hosts: names that requests may address; () for any. A server for this machine alone needs
            the list: else a page of another site could reach it by a name of its own.
        names: those of `hosts` that a proxy in front has; its pages may send requests, too.
        workers: decoding processes.
        decode_seconds: time limit of decoding one file.
        log: of requests: "none", "requests" or "queries".
        metrics: whether /metrics is served.
        clip: the CLIP file, if it has moved.
    """

    token: str = ""
    max_upload: int = 200 << 20
    max_seconds: float = 600.0
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    names: tuple[str, ...] = ()
    workers: int = 2
    decode_seconds: float = 60.0
    log: str = "none"
    metrics: bool = False
    clip: str | None = None


class SafetyMiddleware:
    """Refuses unwanted requests, limits the others, and adds headers to every response."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings
        self._uploads = self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request; stops when its client disconnects."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        upload = scope["method"] == "POST"
        body = _RequestBody(receive, self._limit(scope) if upload else None)
        response = _ResponseSender(send)
        with anyio.move_on_after(UPLOAD_SECONDS if upload else math.inf) as handling:

            def stop(_: asyncio.Task) -> None:
                if not response.complete:
                    handling.cancel()

            disconnect = asyncio.create_task(body.wait_for_disconnect())
            disconnect.add_done_callback(stop)
            try:
                await self._handle(scope, body.receive, response.send)
            except Exception:  # outside of this middleware, an error response would lack headers
                logging.exception("%s %s", scope["method"], printable(scope["path"]))
                if not response.started:
                    failure = error_response(500, "the server failed; its log says more")
                    await failure(scope, receive, response.send)
            finally:
                disconnect.cancel()
        if handling.cancelled_caught and not response.started and not disconnect.done():
            refusal = error_response(408, "the upload took too long", CLOSE)
            await refusal(scope, receive, response.send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal := self._refusal(HTTPConnection(scope)):
            return await refusal(scope, receive, send)
        upload, stream = scope["method"] == "POST", scope["path"].startswith("/media/")
        if (upload and self._uploads >= UPLOADS) or (stream and self._streams >= STREAMS):
            line = f"too many {'uploads' if upload else 'videos'} at a time; try again"
            return await error_response(503, line, {"Retry-After": "5"})(scope, receive, send)
        self._uploads += upload
        self._streams += stream
        try:
            await self._app(scope, receive, send)
        finally:
            self._uploads -= upload
            self._streams -= stream

    def _refusal(self, request: HTTPConnection) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._settings.hosts and _hostname(host) not in self._settings.hosts:
            return error_response(400, "Host: not a name of this server")
        site = (origin or "").partition("://")[2]
        if origin and site != host and _hostname(site) not in self._settings.names:
            return error_response(403, "Origin: pages of other sites may not use this server")
        if length := request.headers.get("content-length"):
            limit = self._limit(request.scope)
            if not length.isdecimal() or len(length) > 15 or int(length) > limit + BODY:
                return error_response(413, _too_large(limit), CLOSE)
        _, options = parse_options_header(request.headers.get("content-type", ""))
        if options.get(b"charset", b"utf-8").lower() not in CHARSETS:
            return error_response(415, "charset: must be utf-8")
        return self._without_token(request) if self._settings.token else None

    def _limit(self, scope: Scope) -> int:
        """Bytes of a request's body, beside `BODY`."""
        if scope["method"] != "POST":
            return 0
        return min(self._settings.max_upload, JSON.get(scope["path"], self._settings.max_upload))

    def _without_token(self, request: HTTPConnection) -> Response | None:
        """The refusal of a request without the token; a redirect of the page's own address."""
        path, parameter = request.scope["path"], request.query_params.get("token", "")
        if path in ("/healthz", "/readyz"):
            return None
        if path == "/" and self._is_token(parameter):
            response = RedirectResponse("/", 303)  # so that the address does not keep the token
            response.set_cookie(
                COOKIE, parameter, httponly=True, samesite="strict", max_age=30 * 86400
            )
            return response
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(bearer.strip()):
            return None
        if self._is_token(request.cookies.get(COOKIE, "")):
            return None
        authenticate = {"WWW-Authenticate": "Bearer"}
        return error_response(401, "a token is needed: open /?token=…", authenticate)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._settings.token.encode())


class _RequestBody:
    """The body of a request.

    Args:
        receive: the server's.
        limit: bytes of an upload; None for requests whose body nobody reads.
    """

    def __init__(self, receive: Receive, limit: int | None):
        self._receive, self._limit = receive, limit
        self._bytes, self._complete = 0, asyncio.Event()
        if limit is None:
            self._complete.set()

    async def receive(self) -> Message:
        """The next part.

        Raises:
            HTTPException: the body is too large, or stalls.
        """
        if self._limit is None:
            return await self._receive()
        try:
            async with asyncio.timeout(UPLOAD_PAUSE):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the upload stalled", CLOSE) from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limit + BODY:
            raise HTTPException(413, _too_large(self._limit), CLOSE)
        if not message.get("more_body"):
            self._complete.set()
        return message

    async def wait_for_disconnect(self) -> None:
        """Returns when the client disconnects; it is looked for once the body is complete."""
        await self._complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _ResponseSender:
    """Sends a response with our headers, and Starlette's plain-text errors as JSON."""

    def __init__(self, send: Send):
        self._send = send
        self.started = self.complete = False
        self._replaced = False

    async def send(self, message: Message) -> None:
        """Sends the next part."""
        self.started = True
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if message["status"] in RANGES and "text/plain" in headers.get("content-type", ""):
                self._replaced = True
                refusal = error_response(message["status"], RANGES[message["status"]])
                headers.update(refusal.headers)
                await self._send(message)
                message = {"type": "http.response.body", "body": refusal.body}
        self.complete = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)


def _hostname(host: str) -> str:
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _too_large(limit: int) -> str:
    return f"larger than the {limit / 2**20:g} MB that are allowed"


def error_response(status: int, message: Any, headers: dict[str, str] | None = None) -> Response:
    """{"error": one line}."""
    line = displayable(" ".join(str(message).split()))
    return JSONResponse({"error": line}, status, headers)
