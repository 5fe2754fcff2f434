"""Metrics on this machine's disk and in a bucket, whose objects cannot be appended to."""

import errno
import os
from unittest import mock

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from vop_jax.errors import UserError
from vop_jax.training import writer
from vop_jax.training.writer import MetricWriter, TensorBoard, read_metrics


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012  one for all instances, as the base class has it
    pseudo_dirs = [""]  # noqa: RUF012

    def _open(self, path, mode="rb", **options):
        if "a" in mode:
            raise ValueError("objects cannot be appended to")
        return super()._open(path, mode, **options)


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return str(tmp_path)
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    epath.Path(f"gs://bucket/{tmp_path.name}").mkdir(parents=True)
    return f"gs://bucket/{tmp_path.name}"


def test_every_line_is_there_at_once_and_a_resumed_run_replaces_later_ones(workdir):
    with MetricWriter(workdir) as metrics:
        for step in (1, 2, 3):
            metrics.write_scalars(step, {"loss": step})
            assert read_metrics(workdir)[-1] == {"step": step, "loss": step}
    with MetricWriter(workdir, resume_step=2) as metrics:
        metrics.write_scalars(3, {"loss": 30})
    assert [line["loss"] for line in read_metrics(workdir)] == [1, 2, 30]


def events(folder):
    """What TensorBoard reads, (step, {tag: value}) and (step, 1) for a start that redoes steps.

    Each event is [length, 4 bytes, it, 4].
    """
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("events.out.tfevents.*")
    content, offset = file.read_bytes(), 0
    while offset < len(content):
        size = int.from_bytes(content[offset : offset + 8], "little")
        event = Event.FromString(content[offset + 12 : offset + 12 + size])
        offset += size + 16
        if event.HasField("summary"):
            yield event.step, {value.tag: value.simple_value for value in event.summary.value}
        if event.HasField("session_log"):
            yield event.step, event.session_log.status


def test_names_are_the_same_in_both_files(tmp_path):
    scalars = {"loss": 0.5, "t2v/R@1": 25.0, "val_v2t_per_caption/MnR": 2.0, "accuracy/a b": 50.0}
    with TensorBoard(tmp_path, 2) as board, MetricWriter(tmp_path, 2, [board]) as metrics:
        metrics.write_scalars(3, scalars)
        assert list(events(tmp_path)) == [(3, 1), (3, scalars)]  # at once
    assert read_metrics(tmp_path) == [{"step": 3, **scalars}]


def test_a_full_disk_is_raised_where_events_are_written(tmp_path, monkeypatch):
    events = TensorBoard(tmp_path)
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
    for step in range(1, 13):  # more than the queue of tensorboardX holds
        with pytest.raises(OSError, match="No space left"):
            events.write_scalars(step, {"loss": 1.0})
    monkeypatch.undo()
    events.close()


def test_a_bucket_without_the_package_for_its_events(monkeypatch, tmp_path):
    missing = mock.Mock(side_effect=ImportError("`google-cloud-storage` must be installed"))
    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter", missing)
    with pytest.raises(UserError, match=r"workdir.*google-cloud-storage.*\.\[gcs\]"):
        TensorBoard(tmp_path)


def test_another_writer_gets_the_same_and_stays_open(tmp_path):
    second = mock.Mock(spec_set=["write_scalars", "flush"])  # closing it is its owner's task
    with MetricWriter(tmp_path, others=[second]) as metrics:
        metrics.write_scalars(1, {"loss": np.float32(0.5), "t2v/R@1": 3})
    second.write_scalars.assert_called_once_with(1, {"loss": 0.5, "t2v/R@1": 3.0})
    second.flush.assert_called()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "t2v/R@1": 3.0}]
    assert [file.name for file in tmp_path.iterdir()] == [writer.METRICS_FILE]
