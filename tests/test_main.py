"""The command line on a folder of videos: whole runs, and every wrong call."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest
from absl import logging

import vop_jax
from tests import runs
from tests.runs import assert_refused
from tests.video import videos
from vop_jax.clip.weights import load_clip
from vop_jax.config.base import workdir_config
from vop_jax.evaluation.evaluate import make_encoders
from vop_jax.experiment import inputs, setup
from vop_jax.storage.tensors import read_metadata
from vop_jax.training import checkpoint
from vop_jax.training.step import learning_rate
from vop_jax.training.writer import read_metrics
from vop_jax.tuning.partition import merge
from vop_jax.tuning.prompt_set import load_prompts

pytestmark = pytest.mark.usefixtures("quiet")

PROMPTS = "prompts.safetensors"
ZERO_SHOT = "--config.method.name=zero_shot"


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory):
    return runs.write_clip(tmp_path_factory.mktemp("clip") / "other.safetensors", seed=1)


@pytest.fixture(scope="module")
def finished(folder, clip, tmp_path_factory):
    """The workdir of a finished run; tests that change it copy it."""
    workdir = tmp_path_factory.mktemp("finished")
    assert runs.call(*runs.arguments(folder, clip, workdir)) == 0
    return workdir


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def steps_of(workdir):
    return [line["step"] for line in read_metrics(workdir)]


def test_a_run_leaves_what_the_contract_says(finished, clip):
    summary = summary_of(finished)
    for side in (summary, summary["before"]):
        for direction in ("t2v", "v2t"):
            assert set(side[direction]) == {"R@1", "R@5", "R@10", "MnR", "MdR"}
    for direction, intervals in summary["intervals"].items():
        for recall, (low, high) in intervals.items():
            assert low <= summary[direction][recall] <= high
    assert summary["method"] == "vop" and summary["steps"] == 4
    layers = runs.CLIP.vision_layers * 32 + runs.CLIP.text_layers * 16
    assert summary["trainable_params"] == summary["paper_params"] == 2 * layers
    assert (summary["num_texts"], summary["num_videos"]) == (runs.TEST, runs.TEST)
    assert summary["skipped_videos"] == [] and summary["videos_per_second"] > 0
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 4
    assert list(finished.glob("events.out.tfevents*")) and (finished / "checkpoints/4").is_dir()
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [0, 1, 2, 4, 4]
    assert lines[0]["t2v/R@1"] == summary["before"]["t2v"]["R@1"]
    assert lines[-1]["v2t/MnR"] == summary["v2t"]["MnR"]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    rankings = [json.loads(line) for line in (finished / "rankings.jsonl").read_text().splitlines()]
    assert [r["video"] for r in rankings] == [f"{runs.TRAIN + i}.mp4" for i in range(runs.TEST)]
    for line in rankings:
        assert line["caption"] == f"clip number {line['video'].removesuffix('.mp4')}"
        assert len(line["top"]) == len(line["similarities"]) == 5
        # Two of the videos are alike: their ranks are tied.
        assert line["rank"] < 2 if line["top"][0] == line["video"] else line["rank"] > 1
    assert np.mean([r["rank"] for r in rankings]) == summary["t2v"]["MnR"]
    metadata = read_metadata(finished / PROMPTS)
    assert metadata["clip_fingerprint"] == load_clip(clip).fingerprint


def test_a_finished_run_again_elsewhere_in_other_shapes(finished, call, tmp_path):
    """Moved records, another mesh and another log change nothing."""
    run, prompts = tmp_path / "run", (finished / PROMPTS).read_bytes()
    shutil.copytree(finished, run)
    (run / "records").rename(tmp_path / "moved")
    changes = ("train.log_every=1", "mesh.data=2", f"data.records={tmp_path / 'moved'}")
    status, out, _ = call(*(f"--config.{change}" for change in changes))
    assert status == 0 and "t2v before" in out and "t2v after" in out
    assert (run / PROMPTS).read_bytes() == prompts
    assert steps_of(run) == [0, 1, 2, 4, 4]


def test_a_workdir_of_another_run_is_refused(finished, call, other_clip, folder, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    refused = call("--config.train.learning_rate=0.25")
    assert_refused(refused, "holds a run with config.train.learning_rate=0.005, not 0.25")
    assert_refused(call(clip=other_clip), "holds a run over", "seed 0", "seed 1")
    other = tmp_path / "folder"
    shutil.copytree(folder, other)
    text = (other / "captions.csv").read_text()
    (other / "captions.csv").write_text(text.replace("clip number 2,", "another clip,"))
    records = f"--config.data.records={tmp_path / 'records'}"
    refused = call(records, folder=other)
    assert_refused(refused, "learnt from other clips or captions than this 'train' split's")
    assert (tmp_path / "run" / PROMPTS).read_bytes() == (finished / PROMPTS).read_bytes()
    # The same prompts cannot start a run over another CLIP either.
    start = f"--config.init.prompts={finished / PROMPTS}"
    refused = call(start, clip=other_clip, workdir=tmp_path / "new")
    assert_refused(refused, "trained over", "seed 0", "seed 1")
    with pytest.raises(vop_jax.UserError, match=r"seed 0.* not over .*seed 1"):
        vop_jax.load(other_clip, finished / PROMPTS)


def test_eval_and_export_agree_with_training_by_the_workdirs_own_config(finished, tmp_path, capsys):
    """Whatever the config file says, or without one; what the command line says must agree."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    workdir, file = f"--workdir={run}", f"--config={runs.ROOT / 'configs/folder.py'}"
    (run / PROMPTS).unlink()
    other = ("--config.eval.batch_size=4", "--config.mesh.data=2")  # may differ
    assert runs.call(workdir, *other, "--mode=eval") == 0
    trained, evaluated = summary_of(finished), summary_of(run)
    for key in ("t2v", "v2t", "before", "steps", "num_texts"):
        assert evaluated[key] == trained[key]
    capsys.readouterr()
    assert runs.call(file, workdir, "--config.train.batch_size=8", "--mode=export") == 0
    assert PROMPTS in capsys.readouterr().out
    for name in (PROMPTS, "config.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    for contradiction, message in (
        ("--config.method.visual_prompts=3", "holds a run with config.method.visual_prompts=2,"),
        (f"{file}:proj", "holds a run with config.method.name='vop', not 'proj'"),
        ("--config=msvd", "config.data.kind='folder', not 'msvd'"),
    ):
        capsys.readouterr()
        status = runs.call(contradiction, workdir, "--mode=eval")
        assert_refused((status, "", capsys.readouterr().err), message)


def test_more_steps_are_a_new_schedule(finished, call, tmp_path, monkeypatch):
    """Also when the disk is full at the first checkpoint of the run's extension."""
    longer = tmp_path / "longer"
    shutil.copytree(finished, longer)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "file"))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", full)
        refused = call("--config.train.steps=6", workdir=longer)
        assert_refused(refused, "no space left on the disk", "the same command continues")
    assert runs.call(f"--workdir={longer}") == 0
    summary = summary_of(longer)
    assert (summary["steps"], summary["extended_at"]) == (6, [4])
    assert summary["before"] == summary_of(finished)["before"]
    assert (longer / PROMPTS).read_bytes() != (finished / PROMPTS).read_bytes()
    config, lines = workdir_config(longer).train, read_metrics(longer)
    assert config.steps == 6 and steps_of(longer) == [0, 1, 2, 4, 4, 5, 6, 6]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert rates[6] == pytest.approx(float(learning_rate(config)(5)))
    # Fewer steps are refused, as are more that only a file sets.
    refused = call("--config.train.steps=5", workdir=longer)
    assert_refused(refused, "holds a run with config.train.steps=6, not 5")


def test_damage_in_a_workdir(finished, call, tmp_path):
    """The run continues from the checkpoint before, to the same bits, or says what to do."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "checkpoints/4/state/manifest.ocdbt").write_bytes(b"")
    (workdir / "summary.json").write_bytes(b"")
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n" + b"".join(lines)[:-9])
    assert call(workdir=workdir)[0] == 0
    assert (workdir / PROMPTS).read_bytes() == (finished / PROMPTS).read_bytes()
    assert (workdir / "checkpoints/4.damaged").exists()
    meta = json.loads((workdir / "checkpoints/4/meta/metadata").read_text())
    assert meta["microbatch"] == 1  # row of each device, as many as there are
    assert steps_of(workdir) == [0, 1, 2, 3, 4, 4], "the first step after a start is logged too"
    (workdir / "config.json").write_bytes(b"")
    refused = call(workdir=workdir)
    assert_refused(refused, "config.json: damaged", "delete it, and the command that made")
    for step in (2, 4):
        (workdir / f"checkpoints/{step}/meta/metadata").unlink()
    (workdir / "config.json").unlink()
    refused = call(workdir=workdir)
    assert_refused(refused, "no checkpoint can be read (step 4: meta/metadata is missing; step 2: ")


def test_before_belongs_to_the_data_that_it_was_measured_on(finished, call, folder, tmp_path):
    run, few = tmp_path / "run", tmp_path / "few.csv"
    shutil.copytree(finished, run)
    rows = (folder / "captions.csv").read_text().splitlines()
    few.write_text("\n".join(rows[: -runs.TEST // 2]) + "\n")
    data = (f"--config.data.annotations={few}", f"--config.data.records={tmp_path / 'records'}")
    assert call(*data, "--config.train.steps=0", workdir=tmp_path / "untrained")[0] == 0
    expected = summary_of(tmp_path / "untrained")
    # An evaluation does not measure anew what was before training.
    assert call(*data, "--mode=eval")[0] == 0
    assert summary_of(run)["before"] is None
    status, out, _ = call(*data)
    assert status == 0 and "(by chance R@1 25 %, R@5 100 %, R@10 100 %)" in out
    summary = summary_of(run)
    assert summary["num_videos"] == runs.TEST // 2 and summary["steps"] == 4
    assert summary["before"] == expected["before"] != summary_of(finished)["before"]
    assert steps_of(run) == [0, 1, 2, 4, 4]


def test_exported_prompts_give_the_features_of_training(finished, folder, clip):
    """Up to the rounding of batches of other sizes."""
    config = workdir_config(finished)
    config.mesh.data = 1
    with setup.open_run(config, str(finished), None) as run:
        data = inputs.load_data(run)
        encode_video, encode_text = make_encoders(run.model, run.mesh)
        frames = next(data.eval_set.videos())["frames"]
        ours = np.asarray(encode_video(merge(run.state.trainable, run.frozen), frames))
        texts = np.asarray(encode_text(merge(run.state.trainable, run.frozen), data.eval_set.ids))
        captions = [c for own in data.packed.splits["test"].captions for c in own]
    retriever = vop_jax.load(clip, finished / PROMPTS)
    np.testing.assert_allclose(retriever.embed_frames(frames), ours, atol=1e-6)
    np.testing.assert_allclose(retriever.embed_text(captions), texts, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    # From the videos the only difference is the JPEG compression of records.
    paths = [folder / "videos" / f"{i}.mp4" for i in range(runs.TRAIN, runs.TRAIN + runs.TEST)]
    assert (retriever.embed_videos(paths) * ours).sum(axis=1).min() > 0.99


def test_prompts_of_a_run_that_saves_memory_start_another(call, clip, tmp_path):
    """They are float32 beside frozen parameters of bfloat16.

    Those with frame tables must be resampled to another number of frames.
    """
    first = tmp_path / "first"
    settings = (
        *("compute.dtype=bfloat16", "compute.remat=full", "compute.frame_chunk=2"),
        *("mesh.data=4", "train.microbatches=2", "train.steps=1"),
        *("data.sampling=rand", "data.stored_fps=10", f"data.records={tmp_path / 'records'}"),
        *("method.name=vop_f+p", "method.specific_prompts=1", "method.suffix=released"),
    )
    settings = tuple(f"--config.{setting}" for setting in settings)
    assert call(*settings, workdir=first)[0] == 0
    prompts = load_prompts(first / PROMPTS)
    assert prompts.clip_fingerprint == load_clip(clip).fingerprint
    assert {leaf.dtype for leaf in jax.tree.leaves(prompts.params)} == {np.dtype(np.float32)}
    start = (*settings, f"--config.init.prompts={first / PROMPTS}")
    assert call(*start, "--mode=eval")[0] == 0
    assert summary_of(tmp_path / "run")["t2v"] == summary_of(first)["t2v"]
    five, other = (*start, "--mode=export", "--config.data.frames=5"), tmp_path / "five"
    assert_refused(
        call(*five, workdir=other),
        "prompts.safetensors: prompts of 3 frame positions, config.data.frames=5",
        "config.init.interpolate_frames=True",
    )
    assert call(*five, "--config.init.interpolate_frames=True", workdir=other)[0] == 0
    assert load_prompts(other / PROMPTS).method.frames == 5
    frames = np.zeros((1, 5, 20, 20, 3), np.uint8)
    with pytest.raises(vop_jax.UserError, match="know 3 frame positions"):
        vop_jax.load(clip, first / PROMPTS).embed_frames(frames)
    resampled = vop_jax.load(clip, first / PROMPTS, frames=5)
    assert resampled.embed_frames(frames).shape == (1, 24)
    for override, message in (
        ("--config.method.name=vop_f", "holds method.name='vop_f+p', config says 'vop_f'"),
        ("--config.method.split_layer=0", "holds method.split_layer=-1, config says 0"),
        ("--config.method.specific_prompts=2", "holds method.specific_prompts=1, config says 2"),
    ):
        refused = call(*start, override, "--mode=eval", workdir=tmp_path / "other")
        assert_refused(refused, "prompts.safetensors", message)


def test_a_zero_shot_run_learns_nothing(call, folder, other_clip, tmp_path):
    """It starts over with another CLIP, and its records need their videos no more."""
    run, moved = tmp_path / "run", tmp_path / "folder"
    shutil.copytree(folder, moved)
    assert call(ZERO_SHOT, folder=moved)[0] == 0
    first = summary_of(run)
    shutil.rmtree(moved / "videos")
    assert call(ZERO_SHOT, "--config.data.videos=", folder=moved, clip=other_clip)[0] == 0
    second = summary_of(run)
    for summary in (first, second):
        assert summary["trainable_params"] == 0 and summary["steps"] == 0
        assert all(summary["before"][side] == summary[side] for side in ("t2v", "v2t"))
    assert first["before"] != second["before"]
    # A split that the records lack needs videos.
    text = (moved / "captions.csv").read_text()
    (moved / "captions.csv").write_text(text + "9.mp4,more,val\n")
    records = f"--config.data.records={run / 'records'}"
    lacking = (ZERO_SHOT, records, "--config.data.eval_split=val", "--config.data.videos=")
    refused = call(*lacking, folder=moved, workdir=tmp_path / "other")
    assert_refused(refused, "config.data.videos is not set")
    # The annotations are compared with the records.
    (moved / "captions.csv").write_text(text.replace("clip number 20,", "another clip,"))
    assert_refused(call(ZERO_SHOT, folder=moved), "were made of other clips or captions")


def test_damaged_videos_and_odd_captions_are_reported(call, folder, tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    run, odd = tmp_path / "run", tmp_path / "folder"
    shutil.copytree(folder, odd)
    (odd / "videos" / "3.mp4").write_bytes(b"")
    videos.write(odd / "videos" / "20.mp4", 1)
    text = (odd / "captions.csv").read_text()
    for old, new in (("2,", "clip " * 60), ("4,", "a left turn"), ("17,", "w " * 40 + "left")):
        text = text.replace(f"clip number {old}", f"{new},")
    (odd / "captions.csv").write_text(text)
    refused = call(folder=odd)
    assert_refused(refused, "split 'train': 1 of 16 videos cannot be used", "3.mp4 (zero bytes)")
    some = "--config.data.max_skipped=0.2"
    caplog.clear()
    status, out, _ = call(some, folder=odd)
    assert status == 0 and "skipped videos: 2" in out
    summary = summary_of(run)
    assert [s["id"] for s in summary["skipped_videos"]] == ["3.mp4", "20.mp4"]
    # A missing video is a miss: its caption still searches, and it still counts.
    assert (summary["num_texts"], summary["num_videos"]) == (runs.TEST, runs.TEST)
    assert summary["missing_videos_count_as"] == "miss" and summary["cut_captions"] == 2
    assert "captions (6.7 %) say left" in caplog.text
    assert "train with --config.data.flip=False" in caplog.text
    assert "cannot be exported with --format=pytorch: the released code" in caplog.text
    assert "train with --config.method.suffix=released" in caplog.text
    # A run without training does not read the training split.
    caplog.clear()
    drop = (some, "--config.eval.missing=drop", "--config.train.steps=0")
    assert call(*drop, folder=odd, workdir=tmp_path / "drop")[0] == 0
    summary = summary_of(tmp_path / "drop")
    assert summary["num_videos"] == runs.TEST - 1 and summary["cut_captions"] == 1
    assert "say left" not in caplog.text
