"""Files become pictures in worker processes, while others are being embedded."""

import contextlib
import dataclasses
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np

from vop_jax.errors import VideoError
from vop_jax.search.scan import Found
from vop_jax.video.moments import (
    WHOLE_FILE,
    DecodedSegments,
    DecodeTask,
    FrameSpec,
    Segment,
    decode_task,
    inspect_video,
    list_moments,
    plan_tasks,
)
from vop_jax.video.workers import in_processes

State = tuple[int, int, int]  # size, nanoseconds of the last changes of content and of the file


class FileChanged(VideoError):
    """A file is another than when its digest was taken."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be decoded of a file.

    Attributes:
        state: of the file when its digest was taken.
        digest: of its content.
        spans: its clip and its moments.
        tasks: that decode them.
    """

    state: State
    digest: str
    spans: list[Segment]
    tasks: list[DecodeTask]


@dataclasses.dataclass(frozen=True)
class Job:
    """A task, of a file that is in this state."""

    task: DecodeTask
    state: State

    @property
    def path(self) -> str:
        """Of the file."""
        return self.task.path


@dataclasses.dataclass
class Work:
    """A file that is being decoded and embedded.

    Attributes:
        found: the file; from when its digest was taken on, as it was then.
        digest: of its content.
        spans: its clip and its moments, in the order of `vectors`.
        vectors: None where not embedded yet.
        numbers: of the moments among the spans.
        undecoded: tasks that are not done.
        unembedded: clips and moments that are decoded and not embedded.
        reason: why it cannot be read.
        changed: it was another file before it was decoded.
    """

    found: Found
    digest: str = ""
    spans: list[Segment] = dataclasses.field(default_factory=list)
    vectors: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    numbers: dict[Segment, int] = dataclasses.field(default_factory=dict)
    undecoded: int = 0
    unembedded: int = 0
    reason: str = ""
    changed: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to wait for."""
        return not self.undecoded and not self.unembedded


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How files are decoded.

    Attributes:
        folder: that their paths are relative to.
        spec: how their pictures are sampled.
        window, stride: seconds of moments.
        workers: processes.
        seconds: that one task may take.
    """

    folder: str
    spec: FrameSpec
    window: float
    stride: float
    workers: int
    seconds: float

    def decode(
        self, files: list[Found], wanted: Callable[[Work], bool]
    ) -> Generator[tuple[Work, list[tuple[int, np.ndarray]]], None, None]:
        """(file, its next [(number of the span, uint8 [F, S, S, 3])]), files in their order.

        A file that cannot be read comes with a `reason`. Of a long one the parts come one by one.

        Args:
            wanted: asked before a file is decoded, when its digest is known.
        """
        under_way: deque[tuple[Work, tuple[Segment, ...]]] = deque()
        paths = (f"{self.folder}/{file.path}" for file in files)
        look = functools.partial(_plan, spec=self.spec, window=self.window, stride=self.stride)
        # Looking reads, decoding computes: one process looks for several that decode.
        lookers = 1 + self.workers // 4
        with contextlib.ExitStack() as stack:

            def pool(call, tasks, workers) -> Iterator:
                results = in_processes(call, tasks, workers, seconds=self.seconds)
                return stack.enter_context(contextlib.closing(results))

            plans = pool(look, paths, lookers)
            jobs = self._jobs(zip(files, plans, strict=True), wanted, under_way)
            decoded = pool(_decode, jobs, self.workers)
            for result in decoded:
                work, spans = under_way.popleft()
                yield work, self._clips(work, spans, result)

    def _jobs(
        self,
        plans: Iterable[tuple[Found, Plan | VideoError]],
        wanted: Callable[[Work], bool],
        under_way: deque[tuple[Work, tuple[Segment, ...]]],
    ) -> Iterator[Job | VideoError]:
        for found, plan in plans:
            work = Work(found)
            if isinstance(plan, VideoError):
                work.undecoded = 1
                under_way.append((work, ()))
                yield plan  # in its turn
                continue
            size, mtime, _ = plan.state
            work.found = Found(found.path, size, mtime)
            work.digest, work.spans = plan.digest, plan.spans
            if not wanted(work):
                continue
            work.numbers = {span: i for i, span in enumerate(work.spans) if i}
            work.vectors = [None] * len(work.spans)
            work.undecoded = len(plan.tasks)
            for task in plan.tasks:
                under_way.append((work, task.segments or (WHOLE_FILE,)))
                yield Job(task, plan.state)

    def _clips(
        self, work: Work, spans: tuple[Segment, ...], result: DecodedSegments | VideoError
    ) -> list[tuple[int, np.ndarray]]:
        """The clips that a task brought."""
        work.undecoded -= 1
        if isinstance(result, VideoError):
            work.reason = work.reason or str(result)
            work.changed |= isinstance(result, FileChanged)
        if isinstance(result, VideoError) or work.reason:
            return []
        clips = []
        for number, span in enumerate(spans):
            pixels = result.clip(number)
            if pixels is not None:  # nothing is shown in some moments of a slide show
                clips.append((0 if span == WHOLE_FILE else work.numbers[span], pixels))
        work.unembedded += len(clips)
        return clips


def _plan(path: str, spec: FrameSpec, window: float, stride: float) -> Plan:
    """In a worker: what one file costs, in memory too, is its own."""
    state = _state(path)
    with _unchanged(path, state):
        found = inspect_video(path, spec)
        # Packets say where a clip ends; where they do not, decoding will find the reason.
        moments = list_moments(found, window, stride)
        tasks = plan_tasks(path, found, moments, spec)
    assert state is not None
    return Plan(state, found.digest, [(0.0, found.duration), *moments], tasks)


def _decode(job: Job | VideoError) -> DecodedSegments:
    if isinstance(job, VideoError):
        raise job
    with _unchanged(job.path, job.state):
        return decode_task(job.task)


@contextlib.contextmanager
def _unchanged(path: str, state: State | None) -> Iterator[None]:
    """Raises FileChanged where a file is not in this state at the end.

    Digest and pictures are of one content then: whatever replaces a file, or writes to it, sets
    the time of its last change, which nothing can set back.
    """
    try:
        yield
    except VideoError:
        if _state(path) == state:
            raise
    if state is None or _state(path) != state:
        raise FileChanged("it changes while it is read")


def _state(path: str) -> State | None:
    """None where it is gone."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
