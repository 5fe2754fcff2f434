"""Runs of two processes with four devices each: trained, stopped, killed, refused."""

import dataclasses
import json
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import processes, runs
from vop_jax.storage import tensors
from vop_jax.training.writer import read_metrics

PROMPTS = "prompts.safetensors"
SETTINGS = ("--config.train.log_every=1", "--config.train.eval_every=2")

ENDLESS = (
    "--config.train.steps=1000000",
    "--config.train.eval_every=0",
    "--config.train.checkpoint_every=1000000",
)

# Runs one command line after the other: starting and joining takes longer than most of them.
SESSION = """
import json, sys
from vop_jax import main

for line in sys.stdin:
    print("status", main.main(json.loads(line)), flush=True)
"""


def flags_to_join(timeout=processes.HANG):
    """The flags with which each of two processes joins the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    shared = [coordinator, "--processes=2", f"--timeout={timeout}"]
    return [[*shared, f"--process={i}"] for i in range(2)]


@dataclasses.dataclass
class Pair:
    """Two processes, each in a folder of its own, where `log` is its stderr."""

    processes: list[processes.Process]
    folders: list[Path]

    @classmethod
    def start(cls, root, *commands):
        """Starts a command in `root/0` and one in `root/1`."""
        pair = cls([], [root / "0", root / "1"])
        for folder, command in zip(pair.folders, commands, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            options = {"cwd": folder, "env": runs.environment(4), "stdin": processes.PIPE}
            with (folder / "log").open("w") as log:
                pair.processes.append(processes.Process(command, stderr=log, **options))
        return pair

    def wait(self):
        """Their exit statuses."""
        return [process.wait() for process in self.processes]

    def logs(self):
        return [(folder / "log").read_text() for folder in self.folders]


class Session(Pair):
    """Two processes that run command lines together."""

    def call(self, argv, own=((), ()), meanwhile=lambda: None):
        """The exit statuses of a command line, and what each process logged.

        Args:
            own: what is added to the command line of each process, and not of the other.
            meanwhile: called while the processes run it.
        """
        before = self.logs()
        for process, flags in zip(self.processes, own, strict=True):
            process.stdin.write(json.dumps([*argv, *flags]) + "\n")
            process.stdin.flush()
        meanwhile()
        statuses = [self._status(process) for process in self.processes]
        return statuses, [a[len(b) :] for a, b in zip(self.logs(), before, strict=True)]

    @staticmethod
    def _status(process):
        lines = (line.split() for line in process.stdout)
        return next((int(words[1]) for words in lines if words[:1] == ["status"]), None)


@pytest.fixture(scope="module")
def arguments(folder, clip):
    """(workdir, overrides) -> a command line."""

    def arguments(workdir, *overrides):
        return runs.arguments(folder, clip, workdir, *SETTINGS, *overrides)

    return arguments


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory, quiet):
    """The workdir of a run by this process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    assert runs.call(*arguments(workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def session(arguments, clip, alone, tmp_path_factory):
    """Two processes that were joined by a run, which a signal to one of them stopped.

    Links to the clip and to records are in the folder of the first alone.
    """
    root = tmp_path_factory.mktemp("session")
    workdir = root / "stopped"
    shutil.copytree(alone, workdir)  # saved by one process, continued by two
    session = Session.start(root, *[[sys.executable, "-c", SESSION]] * 2)
    (root / "0/clip").symlink_to(clip)
    (root / "0/records").symlink_to(alone / "records")

    def stop():
        processes.until(lambda: "continuing" in session.logs()[0], *session.processes)
        session.processes[1].send_signal(signal.SIGTERM)  # while they load

    try:
        argv = arguments(workdir, *ENDLESS)
        statuses, logs = session.call(argv, flags_to_join(), meanwhile=stop)
        assert statuses == [143, 143], logs
        saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
        assert saved == max(losses(workdir)) > 4
        assert f"stopped by a signal after step {saved};" in logs[0]
        assert "stopped by SIGTERM; the same command continues" in logs[0]
        yield session
        for process in session.processes:
            process.stdin.close()
        assert session.wait() == [0, 0], session.logs()
    finally:
        for process in session.processes:
            process.end()


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def assert_same_run(left, right, atol=1e-5):
    """Losses and prompts equal, up to the order of sums."""
    assert losses(left) == pytest.approx(losses(right), abs=atol)
    a, b = (tensors.flatten(tensors.load(w / PROMPTS)[0]) for w in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol, err_msg=name)


def test_two_processes_train_as_one(arguments, alone, session, tmp_path):
    two = tmp_path / "two"
    statuses, logs = session.call(arguments(two))
    assert statuses == [0, 0], logs
    assert_same_run(alone, two)
    # One writer: every line once; and nothing is dropped or repeated in evaluation.
    assert [x["step"] for x in read_metrics(two)] == [x["step"] for x in read_metrics(alone)]
    evaluated = [x["step"] for x in read_metrics(two) if "t2v/R@1" in x]
    assert evaluated == [0, 2, 4]
    summaries = [json.loads((w / "summary.json").read_text()) for w in (alone, two)]
    for key in ("t2v", "v2t", "before", "num_texts", "num_videos", "steps"):
        assert summaries[0][key] == summaries[1][key], key
    assert "step 4/4" in logs[0] and "step 4/4" not in logs[1]
    # What they saved is continued by one process.
    shutil.rmtree(two / "checkpoints/4")
    (two / PROMPTS).unlink()
    assert runs.call(*arguments(two)) == 0
    assert_same_run(alone, two)


@pytest.mark.slow
def test_two_processes_train_from_frames_on_their_devices(arguments, alone, session, tmp_path):
    statuses, logs = session.call(arguments(tmp_path, "--config.data.device_cache_gb=1"))
    assert statuses == [0, 0], logs
    # Devices round crops otherwise than the host.
    assert_same_run(alone, tmp_path, atol=1e-3)
    assert "16 clips on the devices" in logs[0]


@pytest.mark.slow
def test_two_processes_export_as_one(arguments, alone, session, tmp_path):
    """An orbax folder, from which both start again; and programs, which one alone makes."""
    pytest.importorskip("flatbuffers", reason="with which jax writes programs")

    def export(workdir, prompts, form):
        prompts = f"--config.init.prompts={prompts}"
        flags = ("--mode=export", f"--format={form}", prompts)
        statuses, logs = session.call(arguments(workdir, *flags))
        assert statuses == [0, 0], logs

    export(tmp_path / "first", alone / PROMPTS, "orbax")
    export(tmp_path / "again", tmp_path / "first/prompts.orbax", "safetensors")
    one, other = (tensors.load(folder / PROMPTS)[0] for folder in (alone, tmp_path / "again"))
    assert tensors.fingerprint(one) == tensors.fingerprint(other)
    export(tmp_path / "first", alone / PROMPTS, "stablehlo")
    assert (tmp_path / "first/encoders/video.stablehlo").stat().st_size
    assert not list(tmp_path.rglob(".*partial*"))


@pytest.mark.parametrize(
    ("override", "own", "message"),
    [
        ("--config.seed=0", "--config.seed=1", "process 1 has another config than process 0"),
        # These two are in the folder of the first process alone.
        ("--config.data.records=records", "", "config.data.annotations is not set"),
        ("--config.init.clip=clip", "", "clip: no such file"),
        ("--config.train.batch_size=12", "", "batch_size=12: not a multiple of the 8 devices"),
        (
            "--config.data.device_cache_gb=1e-05",
            *("", "device_cache_gb=1e-05: 16 clips of 3 frames of 32 x 32 pixels take"),
        ),
    ],
)
def test_a_mistake_is_reported_by_both(arguments, alone, session, tmp_path, override, own, message):
    flags = (f"--config.data.records={alone / 'records'}", "--config.data.annotations=", override)
    statuses, logs = session.call(arguments(tmp_path / "run", *flags), [(), (own,) if own else ()])
    assert statuses == [2, 2], logs
    for log in logs:
        assert message in log and "Traceback" not in log


@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_one_is_killed_the_other_ends_and_says_so(arguments, alone, tmp_path, dies):
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    argv = runs.command(arguments(workdir, *ENDLESS))
    pair = Pair.start(tmp_path, *([*argv, *flags] for flags in flags_to_join(timeout=10)))
    processes.until(lambda: max(losses(workdir)) >= 6, *pair.processes)
    pair.processes[dies].kill()
    statuses = pair.wait()
    assert statuses[dies] == -signal.SIGKILL and statuses[1 - dies] not in (0, None)
    # A shell says it when the process has ended.
    processes.until(lambda: "ended before the run did" in pair.logs()[1 - dies])
    assert "the same command on all processes continues" in pair.logs()[1 - dies]
