"""Runs whose workdir, CLIP, videos and records lie in a bucket: an emulated gs://."""

import json
import signal
import socket
import sys
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import processes, runs
from vop_jax.report.runs import SUMMARY
from vop_jax.storage import tensors

pytest.importorskip("gcsfs", reason="needs the extra gcs")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="the bucket is emulated")

STEPS = 40
SETTINGS = [
    f"--config.train.{setting}"
    for setting in (f"steps={STEPS}", "log_every=1", "checkpoint_every=100")
]


class Bucket:
    """Objects of gs://vop, over HTTP: file systems are kept for a whole process."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.server = emulator.create_server(
            "127.0.0.1", port, in_memory=True, default_bucket="vop"
        )
        self.server.start()

    def environment(self, devices: int = 1) -> dict[str, str]:
        """Of a process for which this is Google's cloud."""
        return runs.environment(devices) | {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": self.url,  # orbax
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # array_record
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would want credentials
            "GOOGLE_CLOUD_PROJECT": "none",
        }

    def put(self, name: str, source: Path) -> None:
        """A file, or a folder with all below it."""
        for file in source.rglob("*") if source.is_dir() else [source]:
            if file.is_file() and not file.name.startswith("."):  # locks are empty
                whole = f"{name}/{file.relative_to(source)}" if source.is_dir() else name
                query = urllib.parse.urlencode({"uploadType": "media", "name": whole})
                url = f"{self.url}/upload/storage/v1/b/vop/o?{query}"
                urllib.request.urlopen(urllib.request.Request(url, file.read_bytes())).close()

    def get(self, name: str) -> bytes:
        url = f"{self.url}/download/storage/v1/b/vop/o/{urllib.parse.quote(name, '')}?alt=media"
        with urllib.request.urlopen(url) as answer:
            return answer.read()

    def names(self, prefix: str) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/vop/o?prefix={prefix}") as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]


@pytest.fixture(scope="module")
def bucket():
    made = Bucket()
    yield made
    made.server.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory, bucket):
    """A folder on this machine's disk; its videos, captions and CLIP are in the bucket too."""
    root = runs.write_folder(tmp_path_factory.mktemp("bucket"))
    bucket.put("clip.safetensors", runs.write_clip(root / "clip.safetensors"))
    bucket.put("videos", root / "videos")
    bucket.put("captions.csv", root / "captions.csv")
    return root


@pytest.fixture(scope="module")
def trained(local, bucket):
    """The prompts of a run on this machine's disk, whose records are in the bucket then."""
    run = local / "run"
    argv = runs.command([*runs.arguments(local, local / "clip.safetensors", run), *SETTINGS])
    processes.run(argv, env=bucket.environment(8), check=True)
    bucket.put("records", run / "records")
    return tensors.load(run / "prompts.safetensors")[0]


def command(local, workdir, *overrides):
    """The local run's, with everything in the bucket."""
    given = runs.arguments(local, "gs://vop/clip.safetensors", workdir, *SETTINGS)
    given += ["--config.data.annotations=", "--config.data.videos="]
    return runs.command([*given, "--config.data.records=gs://vop/records", *overrides])


def assert_same(file, trained):
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), tensors.load(file)[0], trained)


@pytest.mark.slow
def test_two_processes_stop_in_a_bucket_and_one_goes_on(bucket, local, trained, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = []
    for i in range(2):
        where = (f"--coordinator={address}", "--processes=2", f"--process={i}")
        with open(tmp_path / f"{i}.log", "w") as log:
            argv = command(local, "gs://vop/run", *where)
            both.append(processes.Process(argv, env=bucket.environment(4), stdout=log, stderr=log))

    def said():
        return "\n".join((tmp_path / f"{i}.log").read_text() for i in range(2))

    processes.until(lambda: "step compiled in" in said(), *both)  # then come 40 steps
    both[1].send_signal(signal.SIGTERM)
    assert [p.wait() for p in both] == [143, 143], said()
    steps = {int(name.split("/")[2]) for name in bucket.names("run/checkpoints/")}
    assert len(steps) == 1 and max(steps) < STEPS, steps
    done = processes.run(command(local, "gs://vop/run"), env=bucket.environment(4))
    assert done.returncode == 0, done.stderr
    assert f"continuing gs://vop/run from step {max(steps)}" in done.stderr
    (tmp_path / "prompts.safetensors").write_bytes(bucket.get("run/prompts.safetensors"))
    assert_same(tmp_path / "prompts.safetensors", trained)
    lines = [json.loads(line) for line in bucket.get("run/metrics.jsonl").splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, STEPS + 1))
    (events, *_), summary = bucket.names("run/events"), json.loads(bucket.get("run/summary.json"))
    assert events and summary["steps"] == STEPS
    assert not [name for name in bucket.names("run/") if ".partial" in name or ".writable" in name]


@pytest.mark.slow
def test_records_are_made_of_videos_in_a_bucket(bucket, local, trained, tmp_path):
    given = runs.arguments(local, local / "clip.safetensors", tmp_path / "run", *SETTINGS)
    there = {"annotations": "gs://vop/captions.csv", "videos": "gs://vop/videos"}
    argv = runs.command([*given, *(f"--config.data.{k}={v}" for k, v in there.items())])
    processes.run(argv, env=bucket.environment(), check=True)
    assert_same(tmp_path / "run/prompts.safetensors", trained)


# (workdir, changes to the command, the line on stderr)
REFUSED = (
    ("gs://other/run", [], "error: --workdir=gs://other/run: there is no such bucket"),
    (
        "gs://vop/new",
        ["--config.init.clip=", "--config.pretrain.steps=2", "--config.clip.arch=tiny"],
        "error: --workdir=gs://vop/new: a CLIP is pre-trained on a disk only",
    ),
    (
        "gs://vop/new",
        ["--config.data.records=", "--config.data.videos=.", "--config.data.annotations=x"],
        "error: gs://vop/new/records: there are no records, and they are made on a disk only",
    ),
)
PROGRAM = """
import json, sys
from tests import runs
from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.locate import locate
from vop_jax.report.runs import find_runs

clips, notes = locate([VideoClip("a", "elsewhere/3.avi", ("three",))], "gs://vop/")
print(json.dumps([clips[0].path, *notes]))
print(json.dumps([run.workdir for run in find_runs(["gs://vop/many"])]))
print(json.dumps([runs.call(*argv) for argv in json.loads(sys.argv[1])]))
"""


def test_files_runs_and_wrong_calls_in_a_bucket(bucket, local, tmp_path):
    """In one process, because its start takes most of the time."""
    (tmp_path / "config.json").write_text("{}")
    summary = {key: kind() for key, kind in SUMMARY.items()}  # "", 0 and {}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for name in ("config.json", "summary.json"):
        for folder in ("many/b", "many/b/pretrain", "many/a/deep"):  # the second is the first's
            bucket.put(f"{folder}/{name}", tmp_path / name)
    calls = [command(local, workdir, *changes)[3:] for workdir, changes, _ in REFUSED]
    argv = [sys.executable, "-c", PROGRAM, json.dumps(calls)]
    done = processes.run(argv, env=bucket.environment(), check=True)
    (path, *notes), workdirs, statuses = map(json.loads, done.stdout.splitlines())
    assert path == "gs://vop/videos/3.mp4"
    assert notes[-1].endswith("1 of 1 videos have another extension, first videos/3.mp4")
    assert workdirs == ["gs://vop/many/a/deep", "gs://vop/many/b"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert statuses == [2] * len(REFUSED) == [2] * len(errors)
    for (_, _, expected), line in zip(REFUSED, errors, strict=True):
        assert line.startswith(expected)
