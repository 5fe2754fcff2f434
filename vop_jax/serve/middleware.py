"""Who is let in, how much is taken in, and what browsers are told about what goes out."""

import asyncio
import hmac
import math
import urllib.parse
from collections.abc import Sequence
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
BODY = 64 << 10  # bytes of a request that is no upload, and of what is around an upload
UPLOADS = 8  # at the same time; bounds what lies on the disk
UPLOAD_SECONDS = 600.0  # from the first byte to the answer
UPLOAD_PAUSE = 30.0  # seconds in which nothing of an upload comes
STREAMS = 64  # videos that are sent at the same time; bounds the open files
CHARSETS = (b"utf-8", b"us-ascii")  # of what is written in an upload
CLOSE = {"Connection": "close"}
# What Starlette answers, as text, to the header Range.
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


class Guard:
    """Middleware: hosts, the token, requests of other sites' pages, sizes, headers.

    Args:
        token: that must be given; "" if none.
        hosts: names that requests may be addressed to; () for any.
        names: of those, what a proxy in front is called: its pages may ask, too.
        max_upload: bytes.
    """

    def __init__(
        self, app: ASGIApp, token: str, hosts: Sequence[str], names: Sequence[str], max_upload: int
    ):
        self._app, self._token, self._hosts, self._names = app, token, hosts, names
        self._max_upload = max_upload
        self._uploads = self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; where its client goes away, nothing more is done for it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        upload = scope["method"] == "POST"
        body, answer = _Body(receive, self._max_upload if upload else None), _Answer(send)
        with anyio.move_on_after(UPLOAD_SECONDS if upload else math.inf) as work:

            def stop(gone: asyncio.Task) -> None:
                if not answer.complete:
                    work.cancel()

            gone = asyncio.create_task(body.gone())
            gone.add_done_callback(stop)
            try:
                await self._answer(scope, body.receive, answer.send)
            except Exception:  # answered here: what is outside of this lacks the headers
                logging.exception("%s %s", scope["method"], printable(scope["path"]))
                if not answer.started:
                    failure = error(500, "the server failed; its log says more")
                    await failure(scope, receive, answer.send)
            finally:
                gone.cancel()
        if work.cancelled_caught and not answer.started:
            refusal = error(408, "the upload took too long", CLOSE)
            await refusal(scope, receive, answer.send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal := self._refusal(HTTPConnection(scope)):
            return await refusal(scope, receive, send)
        upload, stream = scope["method"] == "POST", scope["path"].startswith("/media/")
        if (upload and self._uploads >= UPLOADS) or (stream and self._streams >= STREAMS):
            what = "uploads" if upload else "videos"
            busy = error(503, f"too many {what} at a time; try again", {"Retry-After": "5"})
            return await busy(scope, receive, send)
        self._uploads += upload
        self._streams += stream
        try:
            await self._app(scope, receive, send)
        finally:
            self._uploads -= upload
            self._streams -= stream

    def _refusal(self, request: HTTPConnection) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._hosts and _hostname(host) not in self._hosts:
            return error(400, "Host: this server is not called so")
        site = (origin or "").partition("://")[2]
        if origin and site != host and _hostname(site) not in self._names:
            return error(403, "a page of another site may not ask this server")
        if length := request.headers.get("content-length"):
            most = self._max_upload if request.scope["method"] == "POST" else 0
            if not length.isdecimal() or len(length) > 15 or int(length) > most + BODY:
                return error(413, _limit(most), CLOSE)
        _, options = parse_options_header(request.headers.get("content-type", ""))
        if options.get(b"charset", b"utf-8").lower() not in CHARSETS:
            return error(415, "charset: must be utf-8")
        return self._without_token(request) if self._token else None

    def _without_token(self, request: HTTPConnection) -> Response | None:
        path, given = request.scope["path"], request.query_params.get("token", "")
        if path == "/healthz":
            return None
        if path == "/" and self._is_token(given):
            response = RedirectResponse("/", 303)  # so that the address does not hold it
            response.set_cookie(COOKIE, given, httponly=True, samesite="strict", max_age=30 * 86400)
            return response
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(bearer.strip()):
            return None
        if self._is_token(request.cookies.get(COOKIE, "")):
            return None
        return error(401, "a token is needed: open /?token=…", {"WWW-Authenticate": "Bearer"})

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())


class _Body:
    """What comes in of a request.

    Args:
        receive: the server's.
        most: bytes of an upload; None of other requests, whose body nobody reads.
    """

    def __init__(self, receive: Receive, most: int | None):
        self._receive, self._most = receive, most
        self._taken, self._read = 0, asyncio.Event()
        if most is None:
            self._read.set()

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HTTPException: it is too much, or does not come.
        """
        if self._most is None:
            return await self._receive()
        try:
            async with asyncio.timeout(UPLOAD_PAUSE):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the upload does not go on", CLOSE) from None
        self._taken += len(message.get("body", b""))
        if self._taken > self._most + BODY:
            raise HTTPException(413, _limit(self._most), CLOSE)
        if not message.get("more_body"):
            self._read.set()
        return message

    async def gone(self) -> None:
        """Waits for the client to go away, once the body is read."""
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Answer:
    """What goes out: with our headers, its errors as JSON."""

    def __init__(self, send: Send):
        self._send = send
        self.started = self.complete = False
        self._replaced = False

    async def send(self, message: Message) -> None:
        """The next piece."""
        self.started = True
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if message["status"] in RANGES and "text/plain" in headers.get("content-type", ""):
                self._replaced = True
                refusal = error(message["status"], RANGES[message["status"]])
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


def _limit(most: int) -> str:
    return f"more than the {most / 2**20:g} MB that are taken"


def error(status: int, message: Any, headers: dict[str, str] | None = None) -> Response:
    """{"error": one line}."""
    line = displayable(" ".join(str(message).split()))
    return JSONResponse({"error": line}, status, headers)
