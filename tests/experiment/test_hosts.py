"""Runs of two processes with four devices each: trained, stopped, killed, refused."""

import dataclasses
import json
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from tests import processes, runs
from vop_jax.storage import tensors
from vop_jax.training.writer import read_metrics

PROMPTS = "prompts.safetensors"
STEPS = 30
SETTINGS = ("--config.train.log_every=1", "--config.train.eval_every=20")


@dataclasses.dataclass
class Hosts:
    """The processes of a run, and where each one's stderr goes."""

    processes: list[processes.Process]
    logs: list[Path]

    def wait(self) -> list[int]:
        """Their exit statuses."""
        return [process.wait() for process in self.processes]

    def said(self, process: int) -> str:
        return self.logs[process].read_text()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    runs.write_folder(root)
    runs.write_clip(root / "clip.safetensors")
    (root / "workdirs").mkdir()
    return root


def start(
    root,
    name,
    *overrides,
    count=2,
    devices=4,
    timeout=processes.HANG,
    own=None,
    quick=True,
    folders=None,
):
    """The processes of a run, on their way.

    Args:
        count: how many.
        folders: where each process is.
        own: what is added to the command line of each process, and of no other.
        quick: see `xla.flags`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = Hosts([], [])
    env = runs.environment(devices, quick=quick)
    for i in range(count):
        given = runs.arguments(root, root / "clip.safetensors", root / "workdirs" / name)
        argv = runs.command([*given, *SETTINGS, *overrides, *(own[i] if own else ())])
        if count > 1:
            argv += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
            argv += [f"--process={i}", f"--timeout={timeout}"]
        hosts.logs.append(root / f"{name}.{i}.log")
        with hosts.logs[-1].open("w") as log:
            where = folders[i] if folders else None
            process = processes.Process(argv, env=env, cwd=where, stdout=log, stderr=log)
        hosts.processes.append(process)
    return hosts


def until(hosts, workdir, step):
    """Waits for a step to be logged."""
    processes.until(
        lambda: any(line["step"] >= step for line in read_metrics(workdir)), *hosts.processes
    )


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def assert_same_run(left, right, atol=1e-5):
    """Losses and prompts equal, up to the order of sums."""
    assert losses(left).keys() == losses(right).keys()
    for step, loss in losses(left).items():
        assert abs(loss - losses(right)[step]) <= atol, step
    a, b = (tensors.flatten(tensors.load(w / PROMPTS)[0]) for w in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def alone(places, quiet):
    """The workdir of the same run by one process with eight devices."""
    workdir = places / "workdirs/alone"
    argv = runs.arguments(places, places / "clip.safetensors", workdir, *SETTINGS)
    assert runs.call(*argv, f"--config.train.steps={STEPS}") == 0
    return workdir


@pytest.mark.slow
def test_two_processes_train_from_frames_on_their_devices(places, alone):
    steps = f"--config.train.steps={STEPS}"
    hosts = start(places, "cached", steps, "--config.data.device_cache_gb=1")
    assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
    # Devices round crops otherwise than the host.
    assert_same_run(alone, places / "workdirs/cached", atol=1e-3)
    assert "16 clips on the devices" in hosts.said(0)


def test_two_processes_train_as_one_though_stopped_twice(places, alone):
    steps = f"--config.train.steps={STEPS}"
    hosts = start(places, "two", steps, "--config.train.checkpoint_every=100")
    two = places / "workdirs/two"
    until(hosts, two, 1)  # the signal is looked for once a second, and the run must be under way
    hosts.processes[1].send_signal(signal.SIGTERM)
    assert hosts.wait() == [143, 143], hosts.said(0) + hosts.said(1)
    assert "stopped by SIGTERM; the same command continues" in hosts.said(0)
    saved = [int(p.name) for p in (two / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved and max(losses(two)) == max(saved) < STEPS
    # A signal while a run that continues still loads stops it after its first step.
    hosts = start(places, "two", steps)
    processes.until(lambda: "continuing" in hosts.said(0), *hosts.processes)
    hosts.processes[1].send_signal(signal.SIGTERM)
    assert hosts.wait() == [143, 143], hosts.said(0) + hosts.said(1)
    assert f"stopped by a signal after step {max(saved) + 1};" in hosts.said(0)
    # Saved by processes with four devices each, continued with two each.
    hosts = start(places, "two", steps, devices=2)
    assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
    assert_same_run(alone, two)
    # One writer: every line once; and nothing is dropped or repeated in evaluation.
    assert sorted({x["step"] for x in read_metrics(two)}) == [*range(STEPS + 1)]
    evaluated = [[x["step"] for x in read_metrics(w) if "t2v/R@1" in x] for w in (alone, two)]
    assert evaluated == [[0, 20, STEPS]] * 2
    summaries = [json.loads((w / "summary.json").read_text()) for w in (alone, two)]
    for key in ("t2v", "v2t", "before", "num_texts", "num_videos", "steps"):
        assert summaries[0][key] == summaries[1][key], key
    last = f"step {STEPS}/{STEPS}"
    assert last in hosts.said(0) and last not in hosts.said(1)


@pytest.mark.slow
def test_two_processes_export_as_one(places, alone):
    """An orbax folder, from which both start again; and programs, which one alone makes."""
    given, workdir = alone / PROMPTS, places / "workdirs/exported"
    for form in ("orbax", "stablehlo"):
        if form == "stablehlo":
            pytest.importorskip("flatbuffers", reason="with which jax writes programs")
        flags = ("--mode=export", f"--format={form}", f"--config.init.prompts={given}")
        hosts = start(places, "exported", *flags)
        assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
        if form == "orbax":
            folder = workdir / "prompts.orbax"
            flags = ("--mode=export", f"--config.init.prompts={folder}")
            hosts = start(places, "from_orbax", *flags)
            assert hosts.wait() == [0, 0], hosts.said(0) + hosts.said(1)
            again = places / "workdirs/from_orbax" / PROMPTS
            one, other = (tensors.load(path)[0] for path in (given, again))
            assert tensors.fingerprint(one) == tensors.fingerprint(other)
    assert (workdir / "encoders/video.stablehlo").stat().st_size
    assert not list(workdir.rglob(".*partial*"))


@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_one_is_killed_the_other_ends_and_says_so(places, dies):
    name = f"killed{dies}"
    hosts = start(places, name, "--config.train.steps=1000000", timeout=10)
    until(hosts, places / "workdirs" / name, 4)
    hosts.processes[dies].kill()
    statuses = hosts.wait()
    assert statuses[dies] == -signal.SIGKILL and statuses[1 - dies] not in (0, None)
    # A shell says it when the process has ended.
    processes.until(lambda: "ended before the run did" in hosts.said(1 - dies))
    assert "the same command on all processes continues" in hosts.said(1 - dies)


def test_processes_that_differ_are_reported(places):
    hosts = start(places, "differ", own=[[], ["--config.seed=1"]])
    assert hosts.wait() == [2, 2], hosts.said(0) + hosts.said(1)
    for process in range(2):
        assert "process 1 has another config than process 0" in hosts.said(process)
        assert "Traceback" not in hosts.said(process)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.records", "config.data.annotations is not set"),
        pytest.param("init.clip", "here: no such file", marks=pytest.mark.slow),
    ],
)
def test_what_one_machine_lacks_is_reported_by_all(places, alone, tmp_path, key, message):
    """A copy that is there for the first process alone."""
    given = {"data.records": alone / "records", "init.clip": places / "clip.safetensors"}[key]
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "here").symlink_to(given)
    flags = (f"--config.{key}=here", "--config.data.annotations=")
    hosts = start(places, "lacks", *flags, folders=folders)
    assert hosts.wait() == [2, 2], hosts.said(0) + hosts.said(1)
    for process in range(2):
        assert message in hosts.said(process)
        assert "Traceback" not in hosts.said(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("train.batch_size=12", "not a multiple of the 8 devices"),
        ("data.device_cache_gb=1e-05", "16 clips of 3 frames of 32 x 32 pixels take"),
    ],
)
def test_a_mistake_is_reported_by_all(places, mistake, message):
    hosts = start(places, "wrong", f"--config.{mistake}")
    assert hosts.wait() == [2, 2], hosts.said(0) + hosts.said(1)
    for process in range(2):
        assert f"config.{mistake}: {message}" in hosts.said(process)
