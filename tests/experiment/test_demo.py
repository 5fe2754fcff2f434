"""The demo: with a smaller CLIP and a step of each kind, and (slow) as it is shipped."""

import functools
import json

import pytest

from tests import processes, runs
from vop_jax.config.base import workdir_config
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.data.datasets import clips, stills
from vop_jax.experiment import setup

CONFIG = f"--config={runs.ROOT / 'configs/demo.py'}"
TINY = ClipConfig(16, 8, 16, 1, 1, 16, 1, 1, 16, context_length=32)


@pytest.mark.usefixtures("quiet")
def test_one_step_of_everything(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(clips, "render", functools.partial(clips.render, val=0, test=8))
    monkeypatch.setattr(stills, "render", functools.partial(stills.render, train=16, test=8))
    small = {
        "data.rendered": 16,
        "pretrain.steps": 1,
        "pretrain.batch_size": 8,
        "train.steps": 1,
        "train.batch_size": 8,
        "eval.batch_size": 8,
        "eval.extra": "dual_softmax,query_bank",
        "eval.bank": 5,
        "mesh.data": 1,
    }
    overrides = [f"--config.{key}={value}" for key, value in small.items()]
    assert runs.call(CONFIG, f"--workdir={tmp_path}", *overrides) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trainable_params"] == (1 + 1) * 8 * 16  # layers, tokens, width
    assert (summary["num_texts"], summary["num_videos"]) == (8, 8)
    # Averaged frames do not know their order, so both captions of a pair fit either clip.
    for results in (summary, summary["before"]):
        assert set(results["accuracy"]) == {"direction", "speed"}
        assert results["accuracy"]["direction"] == 50
        extras = [key for key in results if "_dual_softmax" in key or "_query_bank" in key]
        assert len(extras) == 4
    inner = json.loads((tmp_path / "pretrain/summary.json").read_text())
    assert "accuracy" not in inner and "t2v_query_bank" not in inner
    assert inner["method"] == "full" and inner["steps"] == 1
    # The next start has a CLIP and a state, and pre-trains nothing.
    config = workdir_config(tmp_path)
    with setup.open_run(config, str(tmp_path), pretrain=pytest.fail) as run:
        assert int(run.state.step) == 1 and run.clip.source == "1 steps on rendered stills"


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
