"""A run that is killed again and again ends where one that is left alone ends."""

import random
import shutil
import signal

import pytest

from tests import processes, runs
from vop_jax.training.writer import read_metrics

KILLED_AT = (3, 11, 20, 34, 47)  # steps, of 60


def start(folder, clip, workdir, steps=60):
    settings = {
        "train.steps": steps,
        "train.checkpoint_every": 5,
        "train.log_every": 1,
        "train.eval_every": 20,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    argv = runs.command(runs.arguments(folder, clip, workdir, *overrides))
    return processes.Process(argv, env=runs.environment(quick=False))


def finish(process):
    _, err = process.communicate()
    return process.returncode, err


def reached(workdir, step):
    lines = read_metrics(workdir)
    return bool(lines) and lines[-1]["step"] >= step


def learnt(workdir):
    """All that was logged, but for the speed."""
    speed = ("videos_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in speed} for line in read_metrics(workdir)]


@pytest.mark.slow
def test_five_kills_change_nothing(folder, clip, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, err = finish(start(folder, clip, whole))
    assert status == 0, err
    for step in KILLED_AT:
        process = start(folder, clip, killed)
        processes.until(lambda: reached(killed, step), process)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
    status, err = finish(start(folder, clip, killed))
    assert status == 0, err
    name = "prompts.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert [x for x in learnt(killed) if "t2v/R@1" in x] == [
        x for x in learnt(whole) if "t2v/R@1" in x
    ]
    losses = [{x["step"]: x["loss"] for x in learnt(w) if "loss" in x} for w in (killed, whole)]
    assert losses[0] == losses[1] and len(losses[1]) == 60


@pytest.mark.slow
def test_two_processes_cannot_share_a_workdir(folder, clip, tmp_path):
    first = start(folder, clip, tmp_path / "run", steps=10**6)
    processes.until(lambda: reached(tmp_path / "run", 1), first)
    status, err = finish(start(folder, clip, tmp_path / "run", steps=10**6))
    assert status == 2 and "another run is using it" in err
    first.send_signal(signal.SIGTERM)
    status, err = finish(first)
    assert status == 143 and "stopped by SIGTERM; the same command continues" in err
    saved = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit())
    assert saved == read_metrics(tmp_path / "run")[-1]["step"]


def damage(rng, content):
    """Emptied, cut off, or with some bytes flipped."""
    if rng.random() < 0.5 or not content:
        return content[: rng.randrange(len(content)) if content and rng.random() < 0.5 else 0]
    changed = bytearray(content)
    for at in rng.choices(range(len(content)), k=rng.choice((1, 8))):
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
# Reads that orbax has given up end after their event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_thirty_damaged_workdirs(folder, clip, tmp_path, capsys):
    """The right end, or one line; never a traceback."""
    whole = tmp_path / "whole"
    assert runs.call(*runs.arguments(folder, clip, whole)) == 0
    prompts, trained = (whole / "prompts.safetensors").read_bytes(), learnt(whole)[-1]
    rng, ends = random.Random(0), []
    for number in range(30):
        workdir = tmp_path / str(number)
        shutil.copytree(whole, workdir)
        newest = [path for path in (workdir / "checkpoints/4").rglob("*") if path.is_file()]
        names = ("config.json", "metrics.jsonl", "summary.json")
        beside = [workdir / name for name in names if rng.random() < 0.2]
        for path in [*rng.sample(sorted(newest), rng.choice((1, 1, 3))), *beside]:
            path.unlink() if rng.random() < 0.25 else path.write_bytes(
                damage(rng, path.read_bytes())
            )
        capsys.readouterr()
        ends.append(runs.call(*runs.arguments(folder, clip, workdir)))
        err = capsys.readouterr().err
        if ends[-1] == 2:
            lines = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and "config.json" in lines[0], err
        else:
            assert ends[-1] == 0 and "Traceback" not in err, err
            assert (workdir / "prompts.safetensors").read_bytes() == prompts, number
            steps = [line["step"] for line in learnt(workdir) if "loss" in line]
            assert steps == sorted(set(steps)), number
            assert learnt(workdir)[-1] == trained
        shutil.rmtree(workdir)
    assert ends.count(0) >= 20
