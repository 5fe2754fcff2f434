"""Scalars to `metrics.jsonl` and TensorBoard, with the methods of clu's MetricWriter."""

import json
import os
import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from absl import logging
from etils import epath

from vop_jax.errors import UserError
from vop_jax.storage.files import write_atomic

METRICS_FILE = "metrics.jsonl"
MEASURED_ON = "measured_on"  # of an evaluation: the fingerprint of the split and the CLIP


class Writer(Protocol):
    """What we use of clu's MetricWriter; scenic's writers are such."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...


class NoWriter:
    """The writer of the processes that leave writing to the first."""

    def write_scalars(self, step: int, scalars: Mapping[str, float], measured_on: str = "") -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TensorBoard(NoWriter):
    """Scalars as TensorBoard events in the workdir; those after `resume_step` are redone."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        # Not its SummaryWriter: that writes in a thread, which a full disk ends; later calls hang.
        from tensorboardX import event_file_writer  # imports torch where it is installed: seconds
        from tensorboardX.proto.event_pb2 import SessionLog

        try:
            event_file_writer.directory_check(str(workdir))
            self._events = event_file_writer.EventsWriter(os.path.join(str(workdir), "events"))
        except ImportError as error:
            raise UserError(f"workdir {workdir}: {error}; pip install -e '.[gcs]'") from None
        if resume_step:
            self._write(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write_scalars(self, step: int, scalars: Mapping[str, float], measured_on: str = "") -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        # `add_scalar` would write R@1 as R_1, a name that is in no other file.
        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._write(step, summary=Summary(value=values))

    def close(self) -> None:
        self._events.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()


class MetricWriter(NoWriter):
    """One JSON object a line, `step` and scalars, ordered by step; a second writer gets the same.

    Attributes:
        lines: what the file holds.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int = 0,
        second: Writer | None = None,
        measured_on: Collection[str] | None = None,
    ):
        """Opens the workdir's metrics; lines after `resume_step` are about to be redone.

        Args:
            second: TensorBoard in the workdir if None. One that is given stays open.
            measured_on: fingerprints of this run's evaluations; those of others are left out.
        """
        self._path = epath.Path(workdir) / METRICS_FILE
        found, damaged = _read(self._path)
        if damaged:
            logging.warning("%s: %d damaged lines are left out", self._path, damaged)
        kept = [line for line in found if line["step"] <= resume_step]
        self.lines = [
            line
            for line in kept
            if measured_on is None or line.get(MEASURED_ON, "") in ("", *measured_on)
        ]
        if others := len(kept) - len(self.lines):
            message = "%s: %d evaluations of other clips, captions or CLIP are left out"
            logging.warning(message, self._path, others)
        # Objects in a bucket cannot grow; there the file, which is small, is written anew.
        self._appends, self._file = "://" not in os.fspath(workdir), None
        self._second = TensorBoard(workdir, resume_step) if second is None else second
        self._rewrite()

    def write_scalars(self, step: int, scalars: Mapping[str, float], measured_on: str = "") -> None:
        """One line; the values are Python or 0-d numbers."""
        numbers = {key: float(value) for key, value in scalars.items()}
        line = {"step": step, **numbers} | ({MEASURED_ON: measured_on} if measured_on else {})
        last = not self.lines or step >= self.lines[-1]["step"]
        self.lines.append(line)
        if self._file is None or not last:
            self.lines.sort(key=lambda line: line["step"])
            self._rewrite()
        else:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._second.write_scalars(step, numbers)

    def flush(self) -> None:
        self._second.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if isinstance(self._second, TensorBoard):
            self._second.close()
        else:
            self._second.flush()

    def _rewrite(self) -> None:
        if self._file is not None:
            self._file.close()
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._file = self._path.open("a") if self._appends else None


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics; what a kill or a disk has damaged is left out."""
    return _read(epath.Path(workdir) / METRICS_FILE)[0]


def _read(path: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """(lines, how many are damaged); a last line without its end is a kill's, and not counted."""
    if not path.exists():
        return [], 0
    *whole, last = path.read_bytes().split(b"\n")
    lines = [line for text in (*whole, last) if (line := _parsed(text)) is not None]
    return lines, len(whole) + (_parsed(last) is not None) - len(lines)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    numbers = (value for key, value in line.items() if key != MEASURED_ON)
    return line if all(type(value) in (int, float) for value in numbers) else None
