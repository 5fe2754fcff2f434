"""Trackers show the metrics of many runs: TensorBoard, Weights & Biases and MLflow.

A workdir has one run in each service. Its id is in the workdir, so a killed run continues there.
"""

import contextlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vop_jax.cli import Interrupted
from vop_jax.config.base import flatten_config, trackers
from vop_jax.errors import UserError
from vop_jax.storage.files import is_remote, write_json
from vop_jax.training import hosts
from vop_jax.training.writer import MEASURED_ON, NoWriter, TensorBoard, Writer, read_metrics

TRACKERS_FILE = "trackers.json"  # {"mlflow": what `Service.begin` returned, …}
PROJECT = "vop_jax"  # of W&B and experiment of MLflow, unless the environment names another

Rows = list[tuple[int, dict[str, float]]]  # [(step, {name: value})]


class Service(NoWriter):
    """A run of a tracking service; the methods of a subclass may raise whatever its client does.

    Once the run has begun, a failure of the service is one warning. The rows that it misses are
    sent again at the end, or by the next start of the run.
    """

    def __init__(self, name: str, workdir: epath.Path, config: ConfigDict, step: int):
        """Opens the workdir's run; it gets those rows of the workdir up to `step` that it lacks."""
        self._name, self._failed = name, False
        self._rows: Rows = []
        path = workdir / TRACKERS_FILE
        known = json.loads(path.read_text()) if path.exists() else {}
        found = self.begin(workdir, config, known.get(name, {}))
        stored = self.stored()
        self._stored = stored or {}
        if name not in known or stored is not None:
            for line in read_metrics(workdir):
                at, measured_on = line.pop("step"), line.pop(MEASURED_ON, "")
                if at <= step:
                    self._add(at, line, measured_on)
            self.send(self._rows)
            self._rows = []
        write_json(path, known | {name: found})

    def _add(self, step: int, scalars: Mapping[str, float], measured_on: str) -> None:
        """Adds what the run does not have yet; an evaluation may be repeated on other data."""

        def is_stored(key: str, value: float) -> bool:
            had = self._stored.get((step, key))
            return had == value if measured_on else had is not None

        if new := {key: value for key, value in scalars.items() if not is_stored(key, value)}:
            self._rows.append((step, new))

    def write_scalars(self, step: int, scalars: Mapping[str, float], measured_on: str = "") -> None:
        self._add(step, scalars, measured_on)
        if self._failed:
            return
        try:
            self.send(self._rows)
            self._rows = []
        except Exception as error:
            self._failed = True
            logging.warning("%s: %s; it gets the rest at the end", self._name, _line(error))

    def __exit__(self, *exception: Any) -> None:
        status = "FAILED" if exception[0] else "FINISHED"
        status = "KILLED" if isinstance(exception[1], Interrupted) else status
        try:
            self.send(self._rows)
            self.end(status)
        except Exception as error:
            logging.warning("%s: %s; the run there is incomplete", self._name, _line(error))

    def begin(self, workdir: epath.Path, config: ConfigDict, known: dict[str, Any]) -> dict:
        """Begins a run, or continues the `known` one; returns what identifies it."""
        raise NotImplementedError

    def stored(self) -> dict[tuple[int, str], float] | None:
        """{(step, name): value} of the run that has begun; None if the service does not say."""
        return None

    def send(self, rows: Rows) -> None:
        """Adds rows to the run."""
        raise NotImplementedError

    def end(self, status: str) -> None:
        """Ends the run: "FINISHED", "FAILED", or "KILLED" by a signal."""
        raise NotImplementedError


class Wandb(Service):
    """A run of Weights & Biases; offline with WANDB_MODE=offline.

    A kill loses the last second or so, so the steps after a checkpoint are sent again.
    """

    def begin(self, workdir: epath.Path, config: ConfigDict, known: dict[str, Any]) -> dict:
        import wandb

        self._run = wandb.init(
            project=known.get("project") or os.environ.get("WANDB_PROJECT", PROJECT),
            entity=known.get("entity"),
            id=known.get("id"),
            resume="allow",
            name=workdir.name,
            config=config.to_dict(),
            allow_val_change=True,
            dir=None if is_remote(workdir) else os.fspath(workdir),
            settings=wandb.Settings(console="off", quiet=True),
        )
        # W&B's own step only grows, and an evaluation shares its step with a training line.
        self._run.define_metric("*", step_metric="step")
        return {key: getattr(self._run, key) or None for key in ("id", "project", "entity")}

    def send(self, rows: Rows) -> None:
        for step, scalars in rows:
            self._run.log({"step": step, **scalars})

    def end(self, status: str) -> None:
        self._run.finish(exit_code=int(status != "FINISHED"))


class Mlflow(Service):
    """A run of MLflow, in a local store or on the server of MLFLOW_TRACKING_URI."""

    def begin(self, workdir: epath.Path, config: ConfigDict, known: dict[str, Any]) -> dict:
        # MLflow's own defaults let a call to a dead server wait for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow
        from mlflow.entities import Param

        uri = mlflow.get_tracking_uri()
        if "uri" in known and not mlflow.is_tracking_uri_set():
            uri = known["uri"]  # the default store is one in the current folder
        self._client = client = mlflow.MlflowClient(uri)
        if known:
            self._id = known["id"]
            client.update_run(self._id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            self._id = client.create_run(experiment, run_name=workdir.name).info.run_id
            values = {"workdir": workdir} | flatten_config(config)
            params = [Param(key, str(value)) for key, value in values.items()]
            for start in range(0, len(params), 100):  # as many as MLflow takes at once
                client.log_batch(self._id, params=params[start : start + 100])
        # A URI of the environment may hold a password.
        return {"id": self._id} if mlflow.is_tracking_uri_set() else {"id": self._id, "uri": uri}

    def stored(self) -> dict[tuple[int, str], float]:
        names = self._client.get_run(self._id).data.metrics
        history = (m for name in names for m in self._client.get_metric_history(self._id, name))
        newest_last = sorted(history, key=lambda metric: metric.timestamp)
        return {(m.step, m.key.replace("_at_", "@")): m.value for m in newest_last}

    def send(self, rows: Rows) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key.replace("@", "_at_"), value, now, step)  # MLflow refuses the letter
            for step, scalars in rows
            for key, value in scalars.items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def end(self, status: str) -> None:
        self._client.set_terminated(self._id, status)


SERVICES: dict[str, tuple[type[Service], str]] = {
    "wandb": (Wandb, "`wandb login` stores a token, WANDB_MODE=offline needs none"),
    "mlflow": (Mlflow, "MLFLOW_TRACKING_URI names a server or a store"),
}


def check(config: ConfigDict) -> None:
    """Raises UserError for a tracker without its package."""
    for name in trackers(config):
        if name in SERVICES and importlib.util.find_spec(name) is None:
            raise UserError(f"config.log.to={name!r}: not installed; pip install -e '.[{name}]'")


@contextlib.contextmanager
def open_trackers(
    config: ConfigDict, workdir: epath.Path, step: int, writer: Writer | None = None
) -> Iterator[list[Writer]]:
    """Yields the writers of `log.to` in the first process, none in the others.

    Args:
        step: the step from which the run continues.
        writer: takes the place of TensorBoard; it is not closed.

    Raises:
        UserError: in all processes, if a service cannot be reached or refuses the run.
    """
    writers: list[Writer] = []

    def open_all(stack: contextlib.ExitStack) -> None:
        names = trackers(config)
        for name in names:
            if name in SERVICES:
                writers.append(stack.enter_context(_open(name, workdir, config, step)))
        if writer is not None:
            writers.append(writer)
        elif "tensorboard" in names:
            writers.append(stack.enter_context(TensorBoard(workdir, step)))

    with contextlib.ExitStack() as stack:
        hosts.on_first(lambda: open_all(stack))
        yield writers


def _open(name: str, workdir: epath.Path, config: ConfigDict, step: int) -> Service:
    service, hint = SERVICES[name]
    try:
        return service(name, workdir, config, step)
    except Exception as error:  # each service's client has its own
        if (path := workdir / TRACKERS_FILE).exists() and name in path.read_text():
            hint += f"; without {path} a new run begins there"
        raise UserError(f"config.log.to={name!r}: {_line(error)}; {hint}") from None


def _line(error: Exception) -> str:
    text = re.sub(r"://[^/\s@]+@", "://", str(error))  # a URI may hold a password
    return " ".join(text.split())[:300] or type(error).__name__
