"""What whoever runs the server reads: a log of requests, /metrics, /healthz and /readyz."""

import logging
import sys
import time
import urllib.parse
from datetime import UTC, datetime
from typing import Any

import anyio
from fastapi import HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vop_jax.errors import UserError
from vop_jax.search.searcher import Searcher
from vop_jax.serve import schema
from vop_jax.serve.executor import Executor

METHODS = "GET", "HEAD", "POST"  # others are one label, as a client may invent any number
LEFT = 499  # status of a request whose client left before the response, as in nginx
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)

router = schema.Router()


class Health(BaseModel):
    """The server answers, or is ready to search."""

    status: str


class Metrics:
    """The numbers of `/metrics`, in Prometheus' own registry."""

    def __init__(self) -> None:
        import prometheus_client as prometheus  # late: only servers with --metrics need it

        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)

        def add(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"vop_{name}", text, labels, registry=self.registry, **options)

        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        labels = "route", "method", "status"
        self._requests = add(counter, "http_requests", "Finished requests", *labels)
        text = "Until the whole response was sent"
        self._children: dict[tuple, tuple] = {}
        self._seconds = add(histogram, "http_request_seconds", text, "route", buckets=SECONDS)
        self.running = add(gauge, "http_requests_running", "Requests that are being answered")
        self._queue = add(gauge, "queue_requests", "Requests that wait for a resource", "resource")
        self._up = add(gauge, "index_up", "1 if the index can be read", "index")
        self._entries = add(gauge, "index_entries", "Size of the index", "index", "kind")
        text = "Unix time of its last change"
        self._changed = add(gauge, "index_changed_timestamp_seconds", text, "index")

    def add(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts a finished request."""
        key = route, method if method in METHODS else "other", status
        if key not in self._children:  # making them takes longer than counting
            self._children[key] = self._requests.labels(*key), self._seconds.labels(route)
        count, histogram = self._children[key]
        count.inc()
        histogram.observe(seconds)

    def text(self, accept: str, executor: Executor, indexes: dict[str, Any]) -> Response:
        """The response to a scrape.

        Args:
            accept: its header, which selects the format.
            indexes: {name: (entries by kind, time of the last change)}; None: cannot be read.
        """
        from prometheus_client.exposition import choose_encoder

        for resource, waiting in executor.waiting().items():
            self._queue.labels(resource).set(waiting)
        self._entries.clear()
        self._changed.clear()
        for name, state in indexes.items():
            self._up.labels(name).set(state is not None)
            for kind, count in state[0].items() if state else ():
                self._entries.labels(name, kind).set(count)
            if state and state[1] is not None:
                self._changed.labels(name).set(state[1])
        encode, kind = choose_encoder(accept)
        return Response(encode(self.registry), headers={"Content-Type": kind})


class MonitoringMiddleware:
    """Logs and counts requests, also those that are refused.

    Args:
        log: "none", "requests" or "queries"; only the last one writes queries, which are private.
        metrics: None if nobody reads them.
    """

    def __init__(self, app: ASGIApp, log: str, metrics: Metrics | None):
        self._app, self._log, self._metrics = app, log, metrics
        self._handler = logging.StreamHandler(sys.stderr)  # survives a closed stderr

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status, size = time.perf_counter(), LEFT, 0

        async def count(message: Message) -> None:
            nonlocal status, size
            await send(message)
            status = message.get("status", status)
            size += len(message.get("body", b""))

        if self._metrics:
            self._metrics.running.inc()
        try:
            await self._app(scope, receive, count)
        finally:
            seconds = time.perf_counter() - began
            if self._metrics:
                self._metrics.running.dec()
                self._metrics.add(_route(scope), scope["method"], status, seconds)
            if self._log != "none":
                # Without a logger, which would look for the line of code that calls it.
                line = self._line(scope, status, seconds, size)
                self._handler.handle(logging.makeLogRecord({"msg": line}))

    def _line(self, scope: Scope, status: int, seconds: float, size: int) -> str:
        """TIME CLIENT METHOD PATH STATUS MILLISECONDS BYTES."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        path = urllib.parse.quote(scope["path"])  # without spaces and control characters
        if self._log == "queries":
            query = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"))
            query = [(name, value) for name, value in query if name != "token"]
            path += f"?{urllib.parse.urlencode(query)}" if query else ""
        client = (scope.get("client") or ("-",))[0]
        return f"{now} {client} {scope['method']} {path} {status} {1e3 * seconds:.1f} {size}"


def _route(scope: Scope) -> str:
    """The path with its parameters' names; raw paths would be a new label each."""
    if route := scope.get("route"):
        return route.path
    return "/static" if scope["path"].startswith("/static/") else "other"


@router.get("/healthz")
async def _health() -> Health:
    """Whether the server answers."""
    return Health(status="ok")


@router.get("/readyz")
def _ready(services: schema.ServicesOf) -> Health:
    """Whether all indexes can be searched: 503 if not."""
    for name, searcher in services.library.items():
        try:
            same = searcher.index.is_current()
        except UserError:  # its text has paths, and this request needs no token
            raise HTTPException(503, f"index {name}: cannot be read") from None
        if not same:
            raise HTTPException(503, f"index {name}: was rebuilt with another model; start again")
    return Health(status="ready")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def _metrics(request: Request, services: schema.ServicesOf) -> Response:
    """Numbers for Prometheus; 404 without --metrics."""
    metrics: Metrics | None = request.app.state.metrics
    if metrics is None:
        raise HTTPException(404, "metrics: start the server with --metrics")
    indexes = {}
    for name, searcher in services.library.items():
        indexes[name] = await anyio.to_thread.run_sync(_state, searcher)
    return metrics.text(request.headers.get("accept", ""), services.executor, indexes)


def _state(searcher: Searcher) -> tuple[dict[str, int], float | None] | None:
    try:
        return searcher.index.counts(), searcher.index.changed()
    except (UserError, OSError):
        return None
