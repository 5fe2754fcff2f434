"""The embedded default: shrunk to a step of each kind, and (slow) as it is shipped."""

import functools
import json

import pytest

from tests import processes, runs
from vop_jax.data.datasets import clips, stills

CONFIG = f"--config={runs.ROOT / 'configs/demo.py'}"


@pytest.mark.usefixtures("quiet")
def test_one_step_of_everything(tmp_path, monkeypatch):
    for module in (clips, stills):
        few = functools.partial(module.render, train=16, test=8)
        monkeypatch.setattr(module, "render", few)
    monkeypatch.setattr(clips, "render", functools.partial(clips.render, val=0))
    small = {
        "pretrain.steps": 1,
        "pretrain.batch_size": 8,
        "train.steps": 1,
        "train.batch_size": 8,
        "eval.batch_size": 8,
        "mesh.data": 1,
    }
    overrides = [f"--config.{key}={value}" for key, value in small.items()]
    assert runs.call(CONFIG, f"--workdir={tmp_path}", *overrides) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    # 4 + 3 layers of width 64, 8 tokens each.
    assert summary["trainable_params"] == (4 + 3) * 8 * 64
    assert (summary["num_texts"], summary["num_videos"]) == (8, 8)
    # Averaged frames do not know their order, so both captions of a pair fit either clip.
    for results in (summary, summary["before"]):
        assert set(results["accuracy"]) == {"direction", "speed"}
        assert results["accuracy"]["direction"] == 50
    inner = json.loads((tmp_path / "pretrain/summary.json").read_text())
    assert "accuracy" not in inner
    assert inner["method"] == "full" and inner["steps"] == 1
    # A second call finds the CLIP there.
    clip = (tmp_path / "clip.safetensors").stat().st_mtime_ns
    assert runs.call(CONFIG, f"--workdir={tmp_path}", *overrides) == 0
    assert (tmp_path / "clip.safetensors").stat().st_mtime_ns == clip


@pytest.mark.slow
def test_as_shipped_it_learns(tmp_path):
    argv = runs.command([CONFIG, f"--workdir={tmp_path}"])
    done = processes.run(argv, env=runs.environment(quick=False))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_texts"], summary["num_videos"]) == (192, 192)
    assert summary["before"]["t2v"]["R@1"] <= 5
    assert summary["t2v"]["R@1"] >= 15
    assert "t2v before" in done.stdout and "t2v after" in done.stdout
