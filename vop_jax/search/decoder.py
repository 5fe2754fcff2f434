"""What a decoding process does with a file; it starts without jax.

Digest and pictures belong to the same content: a file that is replaced or written gets a new time
of change, which no program can set back.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

from vop_jax.errors import UserError, VideoError
from vop_jax.storage import remote
from vop_jax.storage.files import is_remote
from vop_jax.video.moments import (
    DecodedSegments,
    DecodeTask,
    FrameSpec,
    Segment,
    decode_task,
    inspect_video,
    list_moments,
    plan_tasks,
)
from vop_jax.video.shots import ShotTask, decode_shots, plan_shots

State = tuple[int, int, int]  # size, nanoseconds of the last changes of content and of the file


class FileChanged(VideoError):
    """A file changed while it was read."""


@dataclasses.dataclass(frozen=True)
class FilePlan:
    """What to decode of a file.

    Attributes:
        state: of the file when its digest was computed.
        digest: of its content.
        segments: its whole clip, then its moments unless these are shots.
        tasks: that decode the segments, and the shots, in this order.
    """

    state: State
    digest: str
    segments: list[Segment]
    tasks: Sequence[DecodeTask | ShotTask]


def plan_file(
    path: str, spec: FrameSpec, window: float, stride: float, shots: bool = False
) -> FilePlan:
    """Reads a file and lists its segments.

    Args:
        window, stride: seconds of its moments.
        shots: its moments are its shots instead, which are found when it is decoded.

    Raises:
        VideoError: it cannot be read.
        FileChanged: it changed meanwhile.
    """
    state = _state(path)
    with _unchanged(path, state):
        info = inspect_video(path, spec)
        moments = list_moments(info, window, stride)
        tasks = plan_shots(path, info, spec) if shots else plan_tasks(path, info, moments, spec)
    assert state is not None
    return FilePlan(state, info.digest, [(0.0, info.duration), *moments], tasks)


def decode_job(job: tuple[DecodeTask | ShotTask, State]) -> DecodedSegments:
    """Decodes a task of a file that was planned in this state; raises as `plan_file`."""
    task, state = job
    with _unchanged(task.path, state):
        return decode_shots(task) if isinstance(task, ShotTask) else decode_task(task)


@contextlib.contextmanager
def _unchanged(path: str, state: State | None) -> Iterator[None]:
    """Raises FileChanged where a file is not in this state at the end."""
    try:
        yield
    except VideoError:
        if _state(path) == state:
            raise
    if state is None or _state(path) != state:
        raise FileChanged("it changes while it is read")


def _state(path: str) -> State | None:
    """None for a missing file."""
    if is_remote(path):
        try:
            known = remote.describe(path)
        except (OSError, UserError):
            return None
        return known.size, known.mtime, int(known.digest[:15], 16)
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
