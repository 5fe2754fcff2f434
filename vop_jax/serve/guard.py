"""Who is let in, how much is taken in, and what browsers are told about what goes out."""

import asyncio
import hmac
import urllib.parse
from collections.abc import Sequence
from typing import Any

from absl import logging
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "token"
BODY = 64 << 10  # bytes of a request that is no upload, and of what is around an upload
UPLOADS = 8  # at the same time; bounds what lies on the disk
UPLOAD_SECONDS = 600.0  # from the first byte to the answer

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none';"
        " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
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
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = HTTPConnection(scope)
        refusal = self._refusal(request)
        answer = refusal or (self._upload if scope["method"] == "POST" else self._app)
        try:
            await answer(scope, receive, send_with_headers)
        except Exception:  # told here: what is outside of this knows none of the headers
            logging.exception("%s %s", scope["method"], scope["path"])
            if not started:
                failure = error(500, "the server failed; its log says more")
                await failure(scope, receive, send_with_headers)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._hosts and _hostname(host) not in self._hosts:
            return error(400, "Host: this server is not called so")
        site = (origin or "").partition("://")[2]
        if origin and site != host and _hostname(site) not in self._names:
            return error(403, "a page of another site may not ask this server")
        if length := request.headers.get("content-length"):
            most = self._max_upload if request.scope["method"] == "POST" else 0
            if not length.isdecimal() or int(length) > most + BODY:
                return _too_large(most)
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

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._uploads >= UPLOADS:
            refusal = error(503, "too many uploads at a time; try again", {"Retry-After": "5"})
            return await refusal(scope, receive, send)
        started, taken = False, 0

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        async def counting() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_upload + BODY:
                raise HTTPException(413, _limit(self._max_upload), {"Connection": "close"})
            return message

        self._uploads += 1
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                await self._app(scope, counting, noting)
        except TimeoutError:
            if not started:
                refusal = error(408, "the upload took too long", {"Connection": "close"})
                await refusal(scope, receive, send)
        finally:
            self._uploads -= 1


def _hostname(host: str) -> str:
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _limit(most: int) -> str:
    return f"more than the {most / 2**20:g} MB that are taken"


def _too_large(most: int) -> Response:
    return error(413, _limit(most), {"Connection": "close"})


def error(status: int, message: Any, headers: dict[str, str] | None = None) -> Response:
    """{"error": one line}."""
    return JSONResponse({"error": " ".join(str(message).split())}, status, headers)
