"""Scalars to `metrics.jsonl` and TensorBoard, with the methods of clu's MetricWriter."""

import json
import os
from collections.abc import Mapping
from typing import Protocol

from etils import epath

from vop_jax.atomic import write_atomic
from vop_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"


class Writer(Protocol):
    """What we use of clu's MetricWriter; scenic's writers are such."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...


class NoWriter:
    """The writer of the processes that leave writing to the first."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
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
        from tensorboardX import SummaryWriter  # which imports torch where it is installed: seconds

        purged = resume_step + 1 if resume_step else None
        try:
            self._events = SummaryWriter(str(workdir), purge_step=purged)
        except ImportError as error:
            raise UserError(f"workdir {workdir}: {error}; pip install -e '.[gcs]'") from None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        # `add_scalar` would write R@1 as R_1, a name that is in no other file.
        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._events.file_writer.add_summary(Summary(value=values), step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class MetricWriter(NoWriter):
    """Appends one JSON object a line, `step` and scalars, and gives the same to a second writer."""

    def __init__(
        self, workdir: str | os.PathLike, resume_step: int = 0, second: Writer | None = None
    ):
        """Opens the workdir's metrics; lines after `resume_step` are about to be redone.

        Args:
            second: TensorBoard in the workdir if None. One that is given stays open.
        """
        self._path = epath.Path(workdir) / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        self._lines = [json.dumps(line) + "\n" for line in kept]
        self._rewrite()
        self._second = TensorBoard(workdir, resume_step) if second is None else second
        # Objects in a bucket cannot grow; there the file, which is small, is written anew.
        self._file = None if "://" in os.fspath(workdir) else self._path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line; the values are Python or 0-d numbers."""
        numbers = {key: float(value) for key, value in scalars.items()}
        self._lines.append(json.dumps({"step": step, **numbers}) + "\n")
        if self._file is None:
            self._rewrite()
        else:
            self._file.write(self._lines[-1])
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
        write_atomic(self._path, "".join(self._lines).encode())


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a workdir's metrics; a last line cut by a kill is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
