"""The HTTP server: which connections stay open, and how a shutdown ends them.

uvicorn's server does not close the connections of clients that stall.
"""

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

OTHER_FILES = 2 * STREAMS + 96  # descriptors that are no connections


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of connections.

    Attributes:
        connections: open at a time; others are answered with 503.
        idle: seconds until a connection without a request is closed.
        stalled: seconds until a connection is closed whose client stops reading a response.
        shutdown: seconds that running requests have left at a shutdown.
    """

    connections: int = 1000
    idle: float = 10.0
    stalled: float = 30.0
    shutdown: float = 1.0


class Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol with time limits: for a request to come, and for a response to be read."""

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
        """Refuses what is not HTTP; uvicorn's own text would mix with a response being sent."""
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
        # `transport.close` would wait until the client has read everything.
        self._stalled = self.loop.call_later(self._limits.stalled, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _close_if_idle(self) -> None:
        if self.transport.is_closing():  # the end of a response may still be on its way
            self.loop.call_later(self._limits.stalled, self.transport.abort)
            return
        # `cycle` is set when the headers of a request are complete.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        self.loop.call_later(self._limits.idle, self._close_if_idle)


class Server(uvicorn.Server):
    """uvicorn's server, but a shutdown aborts running requests instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, limits: Limits, ready: Callable[[], None]):
        super().__init__(config)
        self._limits, self._ready = limits, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, and calls `ready` when requests are answered."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops; requests that run on are ended as if their clients had disconnected."""
        asyncio.get_running_loop().call_later(self._limits.shutdown, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(app: ASGIApp, limits: Limits, ready: Callable[[], None] = lambda: None) -> Server:
    """A server to run with sockets; when it answers requests, it calls `ready`.

    From then on a signal ends it cleanly.
    """
    config = uvicorn.Config(
        app,
        http=functools.partial(Protocol, limits),  # type: ignore[arg-type]
        ws="none",
        log_level="error",  # a warning for each malformed request would fill the log
        access_log=False,  # it would contain queries, and the token
        server_header=False,
        timeout_graceful_shutdown=int(limits.shutdown) + 1,
    )
    return Server(config, limits, ready)


def available_connections(limit: int) -> int:
    """`limit`, or fewer if this process cannot open as many; raises its limit of open files."""
    soft, hard = (
        number if number != resource.RLIM_INFINITY else 2**20
        for number in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    needed = min(hard, limit + OTHER_FILES)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return max(1, needed - OTHER_FILES)
