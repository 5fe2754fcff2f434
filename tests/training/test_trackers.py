"""Trackers, each in its own real local store: one run a workdir, through kills and failures."""

import json
import sys
import tempfile
from unittest import mock

import pytest
from etils import epath

from tests import runs
from vop_jax.config.base import base_config, trackers
from vop_jax.errors import UserError
from vop_jax.training.trackers import TRACKERS_FILE, check, open_trackers
from vop_jax.training.writer import MetricWriter, read_metrics

ROWS = [(0, {"t2v/R@1": 10.0}), (1, {"loss": 3.0}), (2, {"loss": 2.0}), (2, {"t2v/R@1": 20.0})]
LATER = (4, {"loss": 1.0})
STORE = tempfile.TemporaryDirectory()


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within MLflow


class LocalMlflow:
    """Runs in an SQLite store, which takes seconds to make; each test has its experiment."""

    def __init__(self, root, monkeypatch):
        pytest.importorskip("mlflow", reason="the extra `mlflow`")
        pytest.importorskip("sqlalchemy", reason="the extra `mlflow`")
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{STORE.name}/mlflow.db")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", str(root))
        self._experiment = str(root)

    def runs(self):
        """[(name, status, config, [(step, metric, value)])]."""
        from mlflow import MlflowClient

        client = MlflowClient()
        for run in client.search_runs(
            [client.get_experiment_by_name(self._experiment).experiment_id]
        ):
            keys, run_id = run.data.metrics, run.info.run_id
            history = [m for key in keys for m in client.get_metric_history(run_id, key)]
            values = [(m.step, m.key.replace("_at_", "@"), m.value) for m in history]
            yield run.info.run_name, run.info.status, run.data.params, values


class OfflineWandb:
    """Runs in the workdir's files; each start of a run has a file."""

    def __init__(self, root, monkeypatch):
        wandb = pytest.importorskip("wandb", reason="the extra `wandb`")
        wandb.teardown()  # it remembers the environment of an earlier test
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        self._root = root

    def runs(self):
        """As of `LocalMlflow`; a run that several files share is one."""
        sys.modules["wandb"].teardown()  # its other process writes the files
        found = {}
        for file in sorted(self._root.glob("*/wandb/offline-run-*/*.wandb")):
            records = list(self._records(file))
            begun = next(r.run for r in records if r.HasField("run"))
            sections = {u.key: json.loads(u.value_json) for u in begun.config.update}
            config = {f"train.{k}": str(v) for k, v in sections["train"].items()}
            values = found[begun.run_id][3] if begun.run_id in found else []
            for record in records:
                row = {
                    ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                scalars = [key for key in row if key[0] != "_" and key != "step"]
                values += [(row["step"], key, row[key]) for key in scalars]
            status = "FAILED" if any(r.exit.exit_code for r in records) else "FINISHED"
            found[begun.run_id] = begun.display_name, status, config, values
        return found.values()

    @staticmethod
    def _records(file):
        """The file is LevelDB's log: blocks of 32768 bytes, records of (checksum, size, kind)."""
        from wandb.proto.wandb_internal_pb2 import Record

        data, offset, parts = file.read_bytes(), 7, b""
        while offset + 7 <= len(data):
            if 0 < (left := -offset % 32768) < 7:
                offset += left
                continue
            size, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
            parts, offset = parts + data[offset + 7 : offset + 7 + size], offset + 7 + size
            if kind in (1, 4):  # a whole record, or its last part
                yield Record.FromString(parts)
                parts = b""


@pytest.fixture(params=[LocalMlflow, OfflineWandb])
def service(request, tmp_path, monkeypatch):
    return request.param(tmp_path, monkeypatch)


def config_of(*names):
    config = base_config()
    config.log.to = names
    return config


def record(workdir, config, step, rows):
    """A start of a run that begins after `step`."""
    with (
        open_trackers(config, epath.Path(workdir), step) as writers,
        MetricWriter(workdir, step, writers) as metrics,
    ):
        for at, scalars in rows:
            if scalars is None:
                raise ArithmeticError
            metrics.write_scalars(at, scalars)


def test_a_run_that_is_stopped_continues_in_its_own_run_and_no_step_is_lost(service, tmp_path):
    config = config_of(*{LocalMlflow: ["mlflow"], OfflineWandb: ["wandb"]}[type(service)])
    workdir = tmp_path / "a run"
    workdir.mkdir()
    with pytest.raises(ArithmeticError):
        record(workdir, config, 0, [*ROWS, (3, None)])
    assert [found[:2] for found in service.runs()] == [("a run", "FAILED")]
    config.train.log_every = 7  # may change
    record(workdir, config, 1, [*ROWS[2:], LATER])  # the checkpoint is that of step 1
    record(tmp_path / "other", config, 0, ROWS[:1])
    (name, status, params, values), other = sorted(service.runs())
    assert (name, status, other[0]) == ("a run", "FINISHED", "other")
    assert params["train.steps"] == "1000"
    expected = [(step, *item) for step, row in [*ROWS, LATER] for item in row.items()]
    if isinstance(service, LocalMlflow):
        assert sorted(values) == sorted(expected)
    else:  # it may have lost the steps after the checkpoint, so they are sent again
        assert set(values) == set(expected)
    lines = [(line.pop("step"), line) for line in read_metrics(workdir)]
    assert lines == [*ROWS, LATER]  # the same names
    assert not list(workdir.glob("events*"))


def test_mlflow_has_each_step_once_after_two_kills_and_what_it_missed(tmp_path, monkeypatch):
    service, config = LocalMlflow(tmp_path, monkeypatch), config_of("mlflow")
    steps = [(at, {"loss": float(at), "videos/s": 9.0}) for at in range(1, 6)]
    with pytest.raises(ArithmeticError):
        record(tmp_path, config, 0, [*steps[:4], (5, None)])
    with pytest.raises(ArithmeticError):
        record(tmp_path, config, 1, [(2, steps[1][1] | {"videos/s": 8.0}), (3, None)])
    record(tmp_path, config_of("tensorboard"), 2, steps[2:])  # while the service is down
    record(tmp_path, config, 5, [])
    (found,) = service.runs()
    assert sorted(found[3]) == sorted((at, *item) for at, row in steps for item in row.items())


def test_a_tracker_that_comes_later_gets_what_was_logged_before(tmp_path, monkeypatch):
    service = LocalMlflow(tmp_path, monkeypatch)
    record(tmp_path, config_of("tensorboard"), 0, ROWS)
    record(tmp_path, config_of("tensorboard", "mlflow"), 2, [LATER])
    (found,) = service.runs()
    assert sorted(step for step, _, _ in found[3]) == [0, 1, 2, 2, 4]
    assert list(tmp_path.glob("events*"))


def test_a_service_that_fails_is_one_line(tmp_path, monkeypatch, caplog):
    service = LocalMlflow(tmp_path, monkeypatch)
    import mlflow

    config = config_of("mlflow")
    with (
        open_trackers(config, epath.Path(tmp_path), 0) as writers,
        MetricWriter(tmp_path, 0, writers) as metrics,
        mock.patch.object(mlflow.MlflowClient, "log_batch", side_effect=OSError("gone\naway")),
    ):
        for row in ROWS:
            metrics.write_scalars(*row)
    assert [m for m in caplog.messages if "mlflow" in m] == [
        "mlflow: gone away; it gets the rest at the end"
    ]
    (found,) = service.runs()
    assert len(found[3]) == len(ROWS) and found[1] == "FINISHED"

    (tmp_path / TRACKERS_FILE).write_text('{"mlflow": {"id": "lost", "uri": "sqlite://"}}')
    with pytest.raises(UserError, match=r"log.to='mlflow': Run with id=lost .*without .*/trackers"):
        record(tmp_path, config, 0, [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"log.to='mlflow': .*127.0.0.1.*MLFLOW_TRACKING_URI"):
        record(tmp_path / "new", config, 0, [])


def test_without_a_token_or_a_package(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"log\.to='comet': allowed are tensorboard, wandb, mlflow"):
        trackers(config_of("wandb,comet"))
    assert trackers(config_of("wandb, mlflow", "wandb")) == ("wandb", "mlflow")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        with pytest.raises(UserError, match=r"pip install -e '\.\[mlflow\]'"):
            check(config_of("mlflow"))
    wandb = pytest.importorskip("wandb", reason="the extra `wandb`")
    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path))  # where `wandb login` keeps a token
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"log\.to='wandb': No API key.*WANDB_MODE=offline"):
        record(tmp_path / "run", config_of("wandb"), 0, [])


@pytest.mark.slow
def test_a_run_of_the_command_line_in_all_trackers(folder, clip, tmp_path, monkeypatch, capsys):
    services = [cls(tmp_path, monkeypatch) for cls in (LocalMlflow, OfflineWandb)]
    argv = runs.arguments(folder, clip, tmp_path / "run", "--config.log.to=mlflow,wandb")
    assert runs.call(*argv) == 0
    assert runs.call(*argv, "--config.train.steps=6") == 0
    for service in services:
        ((name, status, params, values),) = service.runs()
        assert (name, status, params["train.batch_size"]) == ("run", "FINISHED", "8")
        keys = {key for _, key, _ in values}
        assert keys >= {"loss", "learning_rate", "videos_per_second", "t2v/R@1", "v2t/MnR"}
        lines = read_metrics(tmp_path / "run")
        assert {step for step, _, _ in values} == {line["step"] for line in lines}
