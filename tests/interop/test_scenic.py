"""Exchange of CLIP's parameters with scenic, and our training as a project of scenic."""

import dataclasses
import json
import os
import sys

import jax
import numpy as np
import pytest

from tests import processes, runs, tiny
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD, Clip
from vop_jax.clip.weights import parameter_shapes
from vop_jax.errors import UserError
from vop_jax.evaluation.evaluate import Evaluation
from vop_jax.experiment import train
from vop_jax.interop import scenic
from vop_jax.storage.tensors import flatten, unflatten
from vop_jax.training.writer import read_metrics
from vop_jax.tuning.methods import MethodConfig


def random_clip(config=tiny.CLIP):
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return unflatten({n: rng.normal(0, 0.2, s).astype(np.float32) for n, s in shapes.items()})


@pytest.mark.parametrize("underscores", [False, True])
def test_both_directions_are_inverses_and_copy_no_array(underscores):
    params = random_clip()
    theirs = scenic.to_scenic(params, underscores=underscores)
    ours = flatten(scenic.from_scenic(theirs))
    assert ours.keys() == flatten(params).keys()
    assert all(ours[name] is leaf for name, leaf in flatten(params).items())
    again = scenic.to_scenic(unflatten(ours), underscores=underscores)
    assert list(flatten(again)) == list(flatten(theirs))
    assert ("resblocks_1" if underscores else "resblocks.1") in theirs["visual"]["transformer"]


def test_sizes_are_inferred_from_shapes_and_there_is_one_activation():
    sizes = dataclasses.replace(tiny.CLIP, image_size=24, text_heads=4)  # no two are equal
    assert scenic.sizes_of(random_clip(sizes)) == sizes
    with pytest.raises(UserError, match="quick_gelu, not gelu"):
        scenic.clip_of(dataclasses.replace(sizes, activation="gelu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flat: flat.pop("visual/conv1/kernel"), "visual/conv1/kernel is missing.*ResNets"),
        (lambda flat: flat.pop("text/ln_final/bias"), "text/ln_final/bias is missing"),
        (lambda flat: flat.update({"visual/bn1/scale": np.ones(3)}), "unknown tensor visual/bn1"),
        (lambda flat: flat.update({"text/ln_final/bias": np.ones(3)}), r"shape \(3,\), expected"),
    ],
)
def test_parameters_of_no_complete_vit_are_refused(change, message):
    flat = flatten(random_clip())
    change(flat)
    for rename in (scenic.from_scenic, scenic.to_scenic):
        with pytest.raises(UserError, match=message):
            rename(unflatten(flat))


def test_without_scenic_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scenic", None)
    for name in ("app", "dataset_lib.datasets", "projects.baselines.clip.layers"):
        monkeypatch.delitem(sys.modules, f"scenic.{name}", raising=False)
    for use in (scenic.register_dataset, lambda: scenic.clip_of(tiny.CLIP)):
        with pytest.raises(UserError, match=r"^scenic\.\S+: .*requirements-scenic\.txt .*PyPI.*\Z"):
            use()
    with pytest.raises(SystemExit) as end:
        scenic._run()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: scenic.app: ") and err.count("\n") == 1


def fields_of(folder, clip):
    """A config with scenic's names."""
    return {
        "rng_seed": 7,
        "batch_size": 8,
        "num_training_steps": 2,
        "init": {"clip": str(clip)},
        "dataset_configs": {
            "annotations": str(folder / "captions.csv"),
            "videos": str(folder / "videos"),
            "num_frames": 3,
            "min_resize": 32,
        },
    }


class FirstScalars(Exception):
    """What we use of clu's writers: it ends a run at its first scalars."""

    def write_scalars(self, step, scalars):
        self.scalars = {"step": step, **scalars}
        raise self

    def flush(self):
        pass


def test_main_trains_by_scenic_s_names_and_logs_through_the_given_writer(
    folder, tmp_path, monkeypatch
):
    results = Evaluation({"t2v": {"R@1": 50.0}}, None, None)
    monkeypatch.setattr(train, "evaluate_split", lambda *arguments: results)
    writer = FirstScalars()
    config = fields_of(folder, runs.write_clip(tmp_path / "clip.safetensors"))
    workdir = tmp_path / "run"
    with pytest.raises(FirstScalars):
        scenic.main(rng=jax.random.key(7), config=config, workdir=str(workdir), writer=writer)
    assert (writer.scalars["step"], writer.scalars["t2v/R@1"]) == (0, 50.0)
    ours = json.loads((workdir / "config.json").read_text())
    assert (ours["seed"], ours["train"]["steps"], ours["data"]["frames"]) == (7, 2, 3)
    assert not list(workdir.glob("events*"))


def test_the_requirements_name_the_commit_of_the_docs():
    lines = (runs.ROOT / "requirements-scenic.txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("scenic")]
    source, _, commit = line.rpartition("@")
    assert source == "scenic @ git+https://github.com/google-research/scenic"
    assert len(commit) == 40 and commit in (runs.ROOT / "docs/guides/scenic.md").read_text()


@pytest.mark.parametrize("underscores", [False, True])
def test_scenic_s_clip_gives_the_same_features(real_scenic, underscores):
    _, params = tiny.model_and_params(MethodConfig(frames=tiny.FRAMES))
    params = params["clip"]
    frames = tiny.frames(2).reshape(-1, *tiny.frames(1).shape[2:])
    ids = tiny.captions(5, 20)  # scenic masks tokens of id 0 as padding
    ids = np.maximum(ids, np.arange(20) <= ids.argmax(-1)[:, None])
    image = (frames.astype(np.float32) / 255 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    theirs = scenic.clip_of(tiny.CLIP, underscores=underscores)
    variables = {"params": scenic.to_scenic(params, underscores=underscores)}
    expected = theirs.init(jax.random.key(0), image, ids)["params"]
    assert jax.tree.map(np.shape, expected) == jax.tree.map(np.shape, variables["params"])
    ours = Clip(tiny.CLIP).apply({"params": params}, frames, ids)
    for mine, other in zip(ours, theirs.apply(variables, image, ids), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_a_run_under_scenic_s_app_leaves_our_files_and_its_events(real_scenic, folder, tmp_path):
    clip = runs.write_clip(tmp_path / "clip.safetensors")
    config = tmp_path / "config.py"
    fields = fields_of(folder, clip) | {
        "dataset_name": "vop_jax",
        "num_training_steps": 4,
        "log_summary_steps": 2,
        "checkpoint_steps": 2,
        "lr_configs": {"base_learning_rate": 1e-2, "warmup_steps": 1},
    }
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    workdir = tmp_path / "run"

    def call(*more):
        argv = [f"--config={config}", f"--workdir={workdir}", *more]
        command = [sys.executable, "-m", "vop_jax.interop.scenic", *argv]
        paths = os.pathsep.join([str(runs.ROOT), *filter(None, sys.path)])
        return processes.run(command, env=runs.environment() | {"PYTHONPATH": paths})

    done = call()
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 4 and "t2v after" in done.stdout
    assert [line["step"] for line in read_metrics(workdir)] == [0, 1, 2, 4, 4]
    assert (workdir / "prompts.safetensors").exists() and (workdir / "checkpoints/4").is_dir()
    assert logged_steps(workdir) == {0, 1, 2, 4}  # in scenic's events
    assert call().returncode == 0  # nothing is left to do
    wrong = call("--config.batch_size=-1")
    lines = [line for line in wrong.stderr.splitlines() if line.startswith("error: ")]
    assert wrong.returncode == 2 and len(lines) == 1 and "batch_size=-1" in lines[0]


def logged_steps(workdir):
    """The steps of the loss and of R@1 in TensorBoard events."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = map(str, workdir.glob("events.out.tfevents*"))
    events = [event for file in files for event in EventFileLoader(file).Load()]
    return {e.step for e in events for v in e.summary.value if v.tag in ("loss", "t2v/R@1")}
