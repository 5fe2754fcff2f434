"""Scalars to `metrics.jsonl` and to trackers, with the methods of clu's MetricWriter."""

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from absl import logging
from etils import epath

from vop_jax.errors import UserError
from vop_jax.storage.files import write_atomic

METRICS_FILE = "metrics.jsonl"
MEASURED_ON = "measured_on"  # key of an evaluation: the fingerprint of its split and the CLIP


class Writer(Protocol):
    """The part of clu's MetricWriter that is used here; scenic's writers have it."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...


class NoWriter:
    """The writer of all processes but the first: it does nothing."""

    def write_scalars(self, step: int, scalars: Mapping[str, float], measured_on: str = "") -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TensorBoard(NoWriter):
    """Scalars as TensorBoard events in the workdir; readers drop those after `resume_step`."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        # Not tensorboardX's SummaryWriter: a full disk ends its thread, and later calls hang.
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

        # `add_scalar` would write R@1 as R_1, a name that no other file has.
        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._write(step, summary=Summary(value=values))

    def close(self) -> None:
        self._events.close()

    def _write(self, step: int, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **fields))
        self._events.flush()


class MetricWriter(NoWriter):
    """One JSON object per line, `step` and scalars, ordered by step; other writers get the same.

    Attributes:
        lines: the content of the file.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int = 0,
        others: Sequence[Writer] = (),
        measured_on: Collection[str] = (),
    ):
        """Opens the workdir's metrics and drops lines after `resume_step`, which come again.

        Args:
            others: their owner closes them.
            measured_on: fingerprints of this run's evaluations; evaluations with others are
                dropped.
        """
        self._path = epath.Path(workdir) / METRICS_FILE
        lines, damaged = _read(self._path)
        if damaged:
            logging.warning("%s: %d damaged lines are left out", self._path, damaged)
        lines = [line for line in lines if line["step"] <= resume_step]
        self.lines = [line for line in lines if line.get(MEASURED_ON, "") in ("", *measured_on)]
        if dropped := len(lines) - len(self.lines):
            message = "%s: %d evaluations of other clips, captions or CLIP are left out"
            logging.warning(message, self._path, dropped)
        # Objects in a bucket cannot grow; there the file, which is small, is rewritten.
        self._appends, self._file = "://" not in os.fspath(workdir), None
        self._others = others
        self._rewrite()

    def write_scalars(self, step: int, scalars: Mapping[str, float], measured_on: str = "") -> None:
        """Writes one line; the values are Python or 0-d numbers."""
        numbers = {key: float(value) for key, value in scalars.items()}
        line = {"step": step, **numbers} | ({MEASURED_ON: measured_on} if measured_on else {})
        is_last = not self.lines or step >= self.lines[-1]["step"]
        self.lines.append(line)
        if self._file is None or not is_last:
            self.lines.sort(key=lambda line: line["step"])
            self._rewrite()
        else:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for other in self._others:
            if isinstance(other, NoWriter):
                other.write_scalars(step, numbers, measured_on)
            else:
                other.write_scalars(step, numbers)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for other in self._others:
            other.flush()

    def _rewrite(self) -> None:
        if self._file is not None:
            self._file.close()
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._file = self._path.open("a") if self._appends else None


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics, without those that a kill or a disk has damaged."""
    return _read(epath.Path(workdir) / METRICS_FILE)[0]


def _read(path: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """(lines, number of damaged ones); a last line that a kill left unfinished is neither."""
    if not path.exists():
        return [], 0
    *whole, last = path.read_bytes().split(b"\n")
    lines = [line for text in (*whole, last) if (line := _parse(text)) is not None]
    return lines, len(whole) + (_parse(last) is not None) - len(lines)


def _parse(text: bytes) -> dict[str, Any] | None:
    """A line as JSON; None where it is not one that `write_scalars` writes."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    numbers = (value for key, value in line.items() if key != MEASURED_ON)
    return line if all(type(value) in (int, float) for value in numbers) else None
