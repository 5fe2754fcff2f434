"""Brings served indexes up to date, in a process of its own beside serving."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from typing import Annotated, Literal

from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel, Field

from vop_jax.search.index import Index
from vop_jax.search.searcher import Searcher
from vop_jax.serve import schema

NICE = 10  # added to the niceness of the process: searches go first
PATIENCE = 3.0  # seconds in which it may end by itself when the server ends
TAIL = 4000  # characters that are kept of its stderr
PERCENT = re.compile(r"(\d+)%\|")  # of a progress bar

router = schema.Router(responses={409: {"model": schema.ErrorResponse}})


class Reindexing(BaseModel):
    """The last run over an index since the server started."""

    index: str
    state: Literal["never", "running", "done", "failed"]
    started: Annotated[float | None, Field(description="Unix time")] = None
    seconds: Annotated[float | None, Field(description="that it took, or has taken")] = None
    progress: Annotated[float | None, Field(description="0 to 1, by bytes of new files")] = None
    report: Annotated[schema.Text, Field(description="what changed, or why it failed")] = ""


class Reindexer:
    """Runs `vop_jax.search index` for one index at a time.

    The process loads the model itself. A search sees what it has committed, so nothing here needs
    to be reloaded, and it may be killed at any time.

    Args:
        clip: the CLIP file, if it has moved.
        workers: decoding processes.
    """

    def __init__(self, clip: str | None, workers: int):
        self._clip, self._workers = clip, workers
        self._runs: dict[str, Reindexing] = {}
        self._task: asyncio.Task | None = None
        self._process: subprocess.Popen

    def start(self, name: str, searcher: Searcher) -> Reindexing:
        """Starts a run.

        Raises:
            HTTPException: one is running.
        """
        running = next((run.index for run in self._runs.values() if run.state == "running"), "")
        if running:
            raise HTTPException(409, f"index {running} is being brought up to date; try later")
        # Beside a server that holds most of a GPU's memory, it takes only what it needs.
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        try:  # not asyncio's processes: uvloop forks for them, which JAX warns of
            self._process = subprocess.Popen(
                command(searcher, self._clip, self._workers),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
            )
        except OSError as error:
            raise HTTPException(503, f"reindex: no process could start: {error.strerror}") from None
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, self._process.pid, own + NICE)
        self._runs[name] = Reindexing(
            index=name, state="running", started=time.time(), progress=0.0
        )
        wait = asyncio.to_thread(_wait, self._process, self._runs[name])
        self._task = asyncio.create_task(wait)
        return self.last(name)

    def last(self, name: str) -> Reindexing:
        """The last run over an index."""
        run = self._runs.get(name) or Reindexing(index=name, state="never")
        if run.state == "running":
            run.seconds = time.time() - (run.started or 0.0)
        return run

    async def close(self) -> None:
        """Ends a running process."""
        if self._task and not self._task.done():
            self._process.terminate()
            await asyncio.wait([self._task], timeout=PATIENCE)
            self._process.kill()  # it may embed for minutes; what it has committed stays
            await asyncio.wait([self._task])


def _wait(process: subprocess.Popen, run: Reindexing) -> None:
    """Describes a run until its process ends."""
    errors = ""
    with process:
        while part := os.read(process.stderr.fileno(), TAIL):  # type: ignore[union-attr]
            errors = (errors + part.decode(errors="replace"))[-TAIL:]
            if percents := PERCENT.findall(errors):
                run.progress = int(percents[-1]) / 100
        report = process.stdout.read().decode(errors="replace")  # type: ignore[union-attr]
    run.seconds = time.time() - (run.started or 0.0)
    run.progress = 1.0 if report else run.progress
    if process.returncode < 0 and not report:
        errors = f"it was killed ({signal.Signals(-process.returncode).name})"
    lines = (report or errors).strip().splitlines() or ["it ended without a word"]
    run.report = "\n".join(lines if report else lines[-1:])  # of errors the last one says why
    # Its report is the last thing that it prints; status 1 with a report: files were skipped.
    run.state = "done" if report else "failed"


def command(searcher: Searcher, clip: str | None, workers: int) -> list[str]:
    """The command line that brings an index up to date."""
    place = f"--store={searcher.index.name}"
    if isinstance(searcher.index, Index):
        place = f"--index={searcher.index.directory.absolute()}"
    options = [place, f"--workers={workers}"]
    options += [f"--clip={clip}"] if clip else []
    return [sys.executable, "-m", "vop_jax.search", "index", *options]


def _reindexer(request: Request) -> Reindexer:
    if request.app.state.reindexer is None:
        raise HTTPException(403, "reindex: only on a server with a token; start it with --token")
    return request.app.state.reindexer


ReindexerOf = Annotated[Reindexer, Depends(_reindexer)]


@router.post("/api/reindex/{index}", status_code=202)
async def _start(reindexer: ReindexerOf, searcher: schema.IndexOfPath, index: str) -> Reindexing:
    """Starts to bring an index up to date; only on a server with a token, one at a time."""
    return reindexer.start(index, searcher)


@router.get("/api/reindex/{index}")
async def _last(reindexer: ReindexerOf, searcher: schema.IndexOfPath, index: str) -> Reindexing:
    """How far it is, or what came of it."""
    return reindexer.last(index)
