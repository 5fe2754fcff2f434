"""Files become pictures in worker processes, while others are being embedded."""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np

from vop_jax.data.moments import (
    WHOLE,
    Pictures,
    Reading,
    Span,
    Survey,
    Task,
    read_pictures,
    spans_of,
    survey,
    tasks_of,
)
from vop_jax.data.workers import in_processes
from vop_jax.errors import VideoError
from vop_jax.search.files import Found


@dataclasses.dataclass
class Work:
    """A file that is being decoded and embedded.

    Attributes:
        found: the file.
        digest: of its content.
        spans: its clip and its moments, in the order of `vectors`.
        vectors: None where not embedded yet.
        numbers: of the moments among the spans.
        undecoded: tasks that are not done.
        unembedded: clips and moments that are decoded and not embedded.
        reason: why it cannot be read.
    """

    found: Found
    digest: str | None = None
    spans: list[Span] = dataclasses.field(default_factory=list)
    vectors: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    numbers: dict[Span, int] = dataclasses.field(default_factory=dict)
    undecoded: int = 0
    unembedded: int = 0
    reason: str = ""

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to wait for."""
        return not self.undecoded and not self.unembedded


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How files are decoded.

    Attributes:
        folder: that their paths are relative to.
        reading: how their pictures are sampled.
        window, stride: seconds of moments.
        workers: processes.
        seconds: that one task may take.
    """

    folder: str
    reading: Reading
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
        under_way: deque[tuple[Work, Task]] = deque()
        paths = (f"{self.folder}/{file.path}" for file in files)
        look = functools.partial(survey, reading=self.reading)
        # Looking reads, decoding computes: one process looks for several that decode.
        lookers = 1 + self.workers // 4
        with contextlib.ExitStack() as stack:

            def pool(call, tasks, workers) -> Iterator:
                results = in_processes(call, tasks, workers, seconds=self.seconds)
                return stack.enter_context(contextlib.closing(results))

            surveys = pool(look, paths, lookers)
            tasks = self._tasks(zip(files, surveys, strict=True), wanted, under_way)
            decoded = pool(_decode, tasks, self.workers)
            for result in decoded:
                work, task = under_way.popleft()
                yield work, self._taken(work, task, result)

    def _tasks(
        self,
        surveys: Iterable[tuple[Found, Survey | VideoError]],
        wanted: Callable[[Work], bool],
        under_way: deque[tuple[Work, Task]],
    ) -> Iterator[Task | VideoError]:
        for found, seen in surveys:
            work = Work(found)
            if isinstance(seen, VideoError):
                work.undecoded = 1
                under_way.append((work, Task(found.path, self.reading)))
                yield seen  # in its turn
                continue
            work.digest = seen.digest
            if not wanted(work):
                continue
            # A clip's end is told by looking; where it isn't, decoding will find the reason.
            whole = (0.0, seen.duration)
            work.spans = [whole, *spans_of(seen, self.window, self.stride)]
            work.numbers = {span: i for i, span in enumerate(work.spans) if i}
            work.vectors = [None] * len(work.spans)
            path = f"{self.folder}/{found.path}"
            tasks = tasks_of(path, seen, work.spans[1:], self.reading)
            work.undecoded = len(tasks)
            for task in tasks:
                under_way.append((work, task))
                yield task

    def _taken(
        self, work: Work, task: Task, result: Pictures | VideoError
    ) -> list[tuple[int, np.ndarray]]:
        """The clips that a task brought."""
        work.undecoded -= 1
        if isinstance(result, VideoError):
            work.reason = work.reason or str(result)
        if isinstance(result, VideoError) or work.reason:
            return []
        spans = task.spans or (WHOLE,)
        clips = []
        for number, span in enumerate(spans):
            pixels = result.clip(number)
            if pixels is not None:  # nothing is shown in some moments of a slide show
                clips.append((0 if span == WHOLE else work.numbers[span], pixels))
        work.unembedded += len(clips)
        return clips


def _decode(task: Task | VideoError) -> Pictures:
    if isinstance(task, VideoError):
        raise task
    return read_pictures(task)
