"""The HTTP server: which connections it keeps, and how it ends."""

import asyncio
import dataclasses
import functools
import json
import resource
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from vop_jax.serve.middleware import STREAMS

FILES = 2 * STREAMS + 96  # descriptors beside those of connections


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server bears of its clients.

    Attributes:
        connections: open at a time; more are answered 503.
        idle: seconds after which a connection is closed that waits for no answer.
        stalled: seconds after which a connection is closed whose client takes nothing of an answer.
        ending: seconds that requests under way have when the server is asked to end.
    """

    connections: int = 1000
    idle: float = 10.0
    stalled: float = 30.0
    ending: float = 1.0


class Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's, but it waits for no client forever: neither for a request, nor for an answer
    to be taken."""

    def __init__(self, limits: Limits, **options: Any):
        super().__init__(**options)
        self._limits = limits
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(503, "too many connections; try again")
        self.loop.call_later(self._limits.idle, self._close_if_idle)

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP. uvicorn's own is no JSON, and mixes with an answer under way."""
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(400, "not a valid HTTP request")
        self.transport.close()

    def _refuse(self, status: int, line: str) -> None:
        body = json.dumps({"error": line})
        head = f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nConnection: close"
        self.transport.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        # `close` would wait for what is written to be taken.
        self._stalled = self.loop.call_later(self._limits.stalled, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _close_if_idle(self) -> None:
        if self.transport.is_closing():  # the last of an answer may still be on its way
            self.loop.call_later(self._limits.stalled, self.transport.abort)
            return
        # A request that is there is one whose headers have come to their end.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        self.loop.call_later(self._limits.idle, self._close_if_idle)


class Server(uvicorn.Server):
    """uvicorn's, but its end breaks off what is under way, instead of waiting for it."""

    def __init__(self, config: uvicorn.Config, limits: Limits, ready: Callable[[], None]):
        super().__init__(config)
        self._limits, self._ready = limits, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Calls `ready` when requests are answered."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Each request learns that its client is gone, and ends."""
        asyncio.get_running_loop().call_later(self._limits.ending, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(
    app: ASGIApp, limits: Limits | None = None, ready: Callable[[], None] = lambda: None
) -> Server:
    """A server to be run with sockets.

    Args:
        ready: called when it answers, and ends cleanly from then on.
    """
    limits = limits or Limits()
    config = uvicorn.Config(
        app,
        http=functools.partial(Protocol, limits),  # type: ignore[arg-type]
        ws="none",
        log_level="error",  # a warning a malformed request would fill the log
        access_log=False,  # it would hold queries, and the token
        server_header=False,
        timeout_graceful_shutdown=int(limits.ending) + 1,
    )
    return Server(config, limits, ready)


def possible_connections(wanted: int) -> int:
    """As many as wanted, or as this process may have; raises its limit of descriptors."""
    soft, hard = (
        limit if limit != resource.RLIM_INFINITY else 2**20
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    needed = min(hard, wanted + FILES)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return max(1, needed - FILES)
