"""The command line on a folder of films: a whole run, and every wrong call."""

import errno
import json
import os
import shutil

import filelock
import jax
import numpy as np
import pytest
from absl import logging

import vop_jax
from tests import runs
from tests.video import videos
from vop_jax.clip.weights import load_clip
from vop_jax.config.base import base_config
from vop_jax.experiment import inputs, setup, train
from vop_jax.storage.tensors import read_metadata
from vop_jax.training.step import learning_rate
from vop_jax.training.writer import read_metrics
from vop_jax.tuning.prompt_set import load_prompts

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return runs.write_clip(tmp_path_factory.mktemp("clip") / "clip.safetensors")


@pytest.fixture(scope="module")
def finished(folder, clip, tmp_path_factory):
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("finished")
    assert runs.call(*runs.arguments(folder, clip, workdir)) == 0
    return workdir


@pytest.fixture
def call(folder, clip, tmp_path, capsys):
    """Calls with overrides; returns (status, stdout, stderr)."""

    def call(*overrides, workdir=tmp_path / "run", **replaced):
        places = {"folder": folder, "clip": clip, **replaced}
        argv = runs.arguments(places["folder"], places["clip"], workdir, *overrides)
        status = runs.call(*argv)
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


def assert_refused(result, *messages):
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, err
    for message in messages:
        assert message in lines[0]


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_a_run_leaves_what_the_contract_says(finished, clip):
    summary = summary_of(finished)
    for side in (summary, summary["before"]):
        for direction in ("t2v", "v2t"):
            assert set(side[direction]) == {"R@1", "R@5", "R@10", "MnR", "MdR"}
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
        # Two of the films are alike: their ranks are tied.
        assert line["rank"] < 2 if line["top"][0] == line["video"] else line["rank"] > 1
    assert np.mean([r["rank"] for r in rankings]) == summary["t2v"]["MnR"]
    metadata = read_metadata(finished / "prompts.safetensors")
    assert metadata["clip_fingerprint"] == load_clip(clip).fingerprint


def test_a_run_that_saves_memory_and_goes_on_without(call, clip, tmp_path):
    """bfloat16 with every knob; what is frozen is held in it, what is written is float32."""
    half = ("--config.compute.dtype=bfloat16", "--config.mesh.data=4", "--config.train.steps=4")
    knobs = ("compute.remat=full", "compute.frame_chunk=2", "train.microbatches=2")
    knobs = (*(f"--config.{knob}" for knob in knobs), "--config.eval.extra=dual_softmax")
    assert call(*half, *knobs, workdir=tmp_path / "run")[0] == 0
    assert "t2v_dual_softmax" in summary_of(tmp_path / "run")
    prompts = load_prompts(tmp_path / "run/prompts.safetensors")
    assert prompts.clip_fingerprint == load_clip(clip).fingerprint
    assert {leaf.dtype for leaf in jax.tree.leaves(prompts.params)} == {np.dtype(np.float32)}
    # None of the knobs is part of what a run learns: the same workdir goes on without them.
    assert call(*half, workdir=tmp_path / "run")[0] == 0


def test_the_same_call_again_changes_nothing(finished, call):
    before = (finished / "prompts.safetensors").read_bytes()
    status, out, _ = call(workdir=finished)
    assert status == 0 and "t2v before" in out and "t2v after" in out
    assert (finished / "prompts.safetensors").read_bytes() == before
    assert [line["step"] for line in read_metrics(finished)] == [0, 1, 2, 4, 4]


def test_eval_and_export_agree_with_training_by_the_workdirs_own_config(finished, tmp_path, capsys):
    """Whatever the config file says, or without one; what the command line says must agree."""
    shutil.copytree(finished, tmp_path / "run")
    workdir, file = f"--workdir={tmp_path / 'run'}", f"--config={runs.ROOT / 'configs/folder.py'}"
    exported = (finished / "prompts.safetensors").read_bytes()
    config = (finished / "config.json").read_bytes()
    (tmp_path / "run/prompts.safetensors").unlink()
    other = ("--config.eval.batch_size=4", "--config.mesh.data=2")  # may differ
    assert runs.call(workdir, *other, "--mode=eval") == 0
    trained, evaluated = summary_of(finished), summary_of(tmp_path / "run")
    for key in ("t2v", "v2t", "before", "steps", "num_texts"):
        assert evaluated[key] == trained[key]
    capsys.readouterr()
    assert runs.call(file, workdir, "--config.train.batch_size=8", "--mode=export") == 0
    assert "prompts.safetensors" in capsys.readouterr().out
    assert (tmp_path / "run/prompts.safetensors").read_bytes() == exported
    assert (tmp_path / "run/config.json").read_bytes() == config
    for contradiction, message in (
        ("--config.method.visual_prompts=3", "holds a run with config.method.visual_prompts=2,"),
        (f"{file}:proj", "holds a run with config.method.name='vop', not 'proj'"),
        (f"--config={runs.ROOT / 'configs/msvd.py'}", "config.data.kind='folder', not 'msvd'"),
    ):
        capsys.readouterr()
        status = runs.call(contradiction, workdir, "--mode=eval")
        assert_refused((status, "", capsys.readouterr().err), message)


def test_more_steps_are_a_new_schedule(finished, call, tmp_path):
    further = "--config.train.steps=6"
    shutil.copytree(finished, tmp_path / "whole")
    assert runs.call(f"--workdir={tmp_path / 'whole'}", further) == 0
    summary = summary_of(tmp_path / "whole")
    assert (summary["steps"], summary["extended_at"]) == (6, [4])
    assert summary["before"] == summary_of(finished)["before"]
    assert (tmp_path / "whole/prompts.safetensors").read_bytes() != (
        finished / "prompts.safetensors"
    ).read_bytes()
    config = setup.configs.workdir_config(tmp_path / "whole").train
    lines = read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 1, 2, 4, 4, 5, 6, 6]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert config.steps == 6
    assert rates[6] == pytest.approx(float(learning_rate(config)(5)))
    # Killed after its first steps and taken up again: the same bits.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/6")
    (tmp_path / "killed/prompts.safetensors").unlink()
    assert runs.call(f"--workdir={tmp_path / 'killed'}") == 0
    for name in ("prompts.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert summary_of(tmp_path / "killed")["extended_at"] == [4]
    # Fewer are refused, and so are more where only a file says them.
    refused = call("--config.train.steps=5", workdir=tmp_path / "whole")
    assert_refused(refused, "holds a run with config.train.steps=6, not 5")


def test_damage_in_a_workdir(finished, call, tmp_path):
    """The checkpoint before, the same bits in the end, every line once; or one line."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "checkpoints/4/state/manifest.ocdbt").write_bytes(b"")
    (workdir / "summary.json").write_bytes(b"")
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n" + b"".join(lines)[:-9])
    assert call(workdir=workdir)[0] == 0
    name = "prompts.safetensors"
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()
    assert (workdir / "checkpoints/4.damaged").exists()
    # The first step after a start is logged too.
    assert [line["step"] for line in read_metrics(workdir)] == [0, 1, 2, 3, 4, 4]
    for content in (b"", b"[]", b'{"train": 3}', b'{"train": {"steps": "4"}}'):
        (workdir / "config.json").write_bytes(content)
        assert_refused(
            call(workdir=workdir), "config.json: damaged", "delete it, and the command that made"
        )
    for step in (2, 4):
        (workdir / f"checkpoints/{step}/meta/metadata").unlink()
    (workdir / "config.json").unlink()
    refused = call(workdir=workdir)
    assert_refused(refused, "no checkpoint can be read (step 4: meta/metadata is missing; step 2: ")


def test_before_belongs_to_the_data_that_it_was_measured_on(finished, call, folder, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    few = tmp_path / "few.csv"
    rows = (folder / "captions.csv").read_text().splitlines()
    few.write_text("\n".join(rows[: -runs.TEST // 2]) + "\n")
    data = (f"--config.data.annotations={few}", f"--config.data.records={tmp_path / 'records'}")
    assert call(*data, "--config.train.steps=0", workdir=tmp_path / "untrained")[0] == 0
    expected = summary_of(tmp_path / "untrained")
    # Looking at it is no reason to measure anew what was before.
    assert call(*data, "--mode=eval")[0] == 0
    assert summary_of(tmp_path / "run")["before"] is None
    status, out, _ = call(*data)
    assert status == 0 and "(by chance R@1 25 %, R@5 100 %, R@10 100 %)" in out
    summary = summary_of(tmp_path / "run")
    assert summary["num_videos"] == runs.TEST // 2 and summary["steps"] == 4
    assert summary["before"] == expected["before"] != summary_of(finished)["before"]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 4, 4]


def test_exported_prompts_give_the_features_of_training(finished, folder, clip):
    """Up to the rounding of batches of other sizes."""
    config = base_config().copy_and_resolve_references()
    with config.unlocked():
        config.update(json.loads((finished / "config.json").read_text()))
        config.data.crop_scale = tuple(config.data.crop_scale)
        config.mesh.data = 1
    with setup.opened(config, str(finished), None) as run:
        data = inputs.load_data(run)
        encode_video, encode_text = train.evaluation.make_encoders(run.model, run.mesh)
        frames = next(data.eval_set.videos())["frames"]
        ours = np.asarray(encode_video(run.params(), frames))
        texts = np.asarray(encode_text(run.params(), data.eval_set.ids))
        captions = [c for own in data.packed.splits["test"].captions for c in own]
    retriever = vop_jax.load(clip, finished / "prompts.safetensors")
    np.testing.assert_allclose(retriever.embed_frames(frames), ours, atol=1e-6)
    np.testing.assert_allclose(retriever.embed_text(captions), texts, atol=1e-6)
    # From the files the only difference is that of JPEG records.
    paths = [folder / "videos" / f"{i}.mp4" for i in range(runs.TRAIN, runs.TRAIN + runs.TEST)]
    assert (retriever.embed_videos(paths) * ours).sum(axis=1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)


def test_params_need_neither_weights_nor_workdir(tmp_path, capsys):
    config = f"--config={runs.ROOT / 'configs/folder.py'}"
    table = tmp_path / "params.json"
    assert runs.call(config, "--mode=params", f"--json={table}") == 0
    assert "122,880" in capsys.readouterr().out
    counts = json.loads(table.read_text())
    assert counts["vop"] == {
        "trainable": 122880,
        "paper": 122880,
        "percent": pytest.approx(0.1025, abs=1e-3),
    }
    assert counts["full"] == {"trainable": 151277313, "paper": 119826432, "percent": 100.0}


def test_evaluation_alone_needs_no_training(call, tmp_path):
    assert call("--config.method.name=zero_shot")[0] == 0
    summary = summary_of(tmp_path / "run")
    assert summary["trainable_params"] == 0 and summary["steps"] == 0
    assert summary["t2v"] == summary["before"]["t2v"]


def test_prompts_of_a_run_can_start_another(finished, call, tmp_path):
    prompts = f"--config.init.prompts={finished / 'prompts.safetensors'}"
    status, _, _ = call(prompts, "--config.train.steps=0", "--mode=eval")
    assert status == 0
    assert summary_of(tmp_path / "run")["t2v"] == summary_of(finished)["t2v"]


VIDEO_PROMPTS = ("--config.method.name=vop_f+p", "--config.method.specific_prompts=1")


@pytest.fixture(scope="module")
def of_three_frames(folder, clip, tmp_path_factory):
    """Prompts with tables of three frame positions."""
    workdir = tmp_path_factory.mktemp("of_three_frames")
    overrides = (*VIDEO_PROMPTS, "--config.train.steps=1")
    assert runs.call(*runs.arguments(folder, clip, workdir, *overrides)) == 0
    return workdir / "prompts.safetensors"


def test_prompts_of_another_frame_count_are_refused_or_resampled(call, clip, of_three_frames):
    given = (*VIDEO_PROMPTS, f"--config.init.prompts={of_three_frames}", "--mode=eval")
    other = "--config.data.frames=5"
    assert_refused(
        call(*given, other),
        "prompts.safetensors: prompts of 3 frame positions, config.data.frames=5",
        "config.init.interpolate_frames=True",
    )
    assert call(*given, other, "--config.init.interpolate_frames=True")[0] == 0
    retriever = vop_jax.load(clip, of_three_frames)
    with pytest.raises(vop_jax.UserError, match="know 3 frame positions"):
        retriever.embed_frames(np.zeros((1, 5, 20, 20, 3), np.uint8))
    retriever = vop_jax.load(clip, of_three_frames, frames=5)
    assert retriever.embed_frames(np.zeros((1, 5, 20, 20, 3), np.uint8)).shape == (1, 24)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.method.name=vop_f", "holds method.name='vop_f+p', config says 'vop_f'"),
        ("--config.method.split_layer=0", "holds method.split_layer=-1, config says 0"),
        ("--config.method.specific_prompts=2", "holds method.specific_prompts=1, config says 2"),
    ],
)
def test_prompts_of_another_method_are_refused(call, of_three_frames, override, message):
    given = (*VIDEO_PROMPTS, f"--config.init.prompts={of_three_frames}", override)
    assert_refused(call(*given, "--mode=eval"), "prompts.safetensors", message)


def test_bfloat16_and_rand_sampling_run(call):
    status, _, _ = call(
        "--config.compute.dtype=bfloat16",
        "--config.data.sampling=rand",
        "--config.data.stored_fps=10",
        "--config.train.eval_every=2",
        "--config.method.suffix=released",
    )
    assert status == 0


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("--config.train.lr=3", ("config.train.lr: no such key; there are train.batch_size, ",)),
        (
            "--config.train.step=3",
            ("config.train.step: no such key; did you mean config.train.steps?",),
        ),
        (
            "--config.trian.steps=3",
            ("config.trian.steps: no such key; did you mean config.train.steps?",),
        ),
        ("--config.train.steps=many", ("--config.train.steps=many: must be a whole number",)),
        ("--config.data.flip=perhaps", ("--config.data.flip=perhaps: must be True or False",)),
        ("--config.train.batch_size=0", ("config.train.batch_size=0: must be 1 or more",)),
        ("--config.train.learning_rate=nan", ("config.train.learning_rate=nan",)),
        ("--config.method.name=vopp", ("method.name='vopp'", "vop")),
        ("--config.method.suffix=end", ("method.suffix='end'", "eot, released")),
        ("--config.method.first_layer=9", ("first_layer=9", "layers 1 to 2")),
        ("--config.method.text_prefix=40", ("text_prefix",)),
        ("--config.data.kind=webdataset", ("config.data.kind='webdataset'", "folder")),
        ("--config.data.sampling=rand", ("data.stored_fps",)),
        ("--config.data.eval_split=val", ("config.data.eval_split='val'", "train (16), test (8)")),
        ("--config.data.annotations=no.csv", ("no.csv: no such annotation file",)),
        ("--config.data.annotations=", ("config.data.annotations is not set",)),
        ("--config.data.videos=nowhere", ("nowhere: no such folder of videos",)),
        ("--config.init.clip=no.safetensors", ("no.safetensors: no such file",)),
        ("--config.init.clip=", ("config.init.clip is not set", "convert_clip_weights.py")),
        ("--config.init.prompts=no.safetensors", ("no.safetensors: no such file",)),
        ("--config.clip.arch=ViT-B/32", ("config.clip.arch=ViT-B/32", "seed 0")),
        ("--config.clip.arch=ViT-B", ("allowed are", "ViT-B/32")),
        ("--config.clip.activation=gelu", ("config.clip.activation=gelu", "quick_gelu")),
        ("--config.compute.attention=cudnn", ("needs config.compute.dtype='bfloat16'",)),
        (
            "--config.compute.attention=flash",
            ("allowed are auto, xla, fused, cudnn, splash, blocks",),
        ),
        ("--config.compute.remat=all", ("allowed are none, dots, full",)),
        ("--config.compute.frame_chunk=-1", ("config.compute.frame_chunk=-1: must be 0 or more",)),
        ("--config.train.microbatches=0", ("config.train.microbatches=0: must be 1 or more",)),
        ("--config.train.microbatches=2", ("does not divide the 1 of train.batch_size=8",)),
        ("--config.mesh.data=99", ("config.mesh.data=99", "devices")),
        ("--config.train.batch_size=9", ("config.train.batch_size=9", "8 devices")),
        ("--mode=deploy", ("deploy", "train")),
        ("--mdoe=train", ("mdoe", "mode")),
        ("train", ("train: not a flag",)),
        ("--mode=eval", ("no checkpoint; train first",)),
        ("--mode=export", ("no checkpoint; train first",)),
        (f"--config={runs.ROOT / 'configs/demo.py'}", ("--config: give one file",)),
        ("--workdir=", ("--workdir=DIR is missing",)),
    ],
)
def test_wrong_calls_get_one_line(call, override, messages):
    assert_refused(call(override), *messages)


def test_a_config_file_in_a_word_of_its_own(capsys):
    assert runs.call("--config", "configs/nothing.py", "--workdir=x") == 2
    assert "error: --config=configs/nothing.py: no such file" in capsys.readouterr().err


def test_no_config_at_all(capsys):
    assert runs.call("--workdir=x") == 2
    assert "--config=FILE is missing, and --workdir=x holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("def get_config():\n    raise RuntimeError('boom')\n", ("c.py:2: RuntimeError: boom",)),
        ("def get_config(:\n", ("c.py:1: SyntaxError",)),
        ("def get_config():\n    return {'seed': 1}\n", ("--config",)),
        ("x = 1\n", ("the file defines no get_config()",)),
        ("open('lost.txt')\n", ("--config", "lost.txt")),
        ("def get_config():\n    raise ValueError('no [Errno 2] this')\n", ("no [Errno 2] this",)),
    ],
)
def test_a_config_file_that_is_none(tmp_path, capsys, text, messages):
    (tmp_path / "c.py").write_text(text)
    status = runs.call(f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'run'}")
    assert_refused((status, "", capsys.readouterr().err), *messages)


def test_a_workdir_that_cannot_be(call, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_refused(call(workdir=tmp_path / "file"), "file: not a folder to write in")
    records = f"--config.data.records={tmp_path / 'file'}"
    assert_refused(call(records), "file: not a folder to write records in")


def test_a_file_that_is_no_clip(call, finished, tmp_path):
    assert_refused(call(clip=finished / "prompts.safetensors"), "not a converted CLIP")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x00" * 100)
    assert_refused(call(clip=torn), "torn.safetensors: not a readable safetensors file")


def test_prompts_made_for_another_clip(call, finished, tmp_path):
    other = runs.write_clip(tmp_path / "other.safetensors", seed=1)
    prompts = f"--config.init.prompts={finished / 'prompts.safetensors'}"
    assert_refused(call(prompts, clip=other), "trained over", "seed 0", "seed 1")
    with pytest.raises(vop_jax.UserError, match=r"seed 0.* not over .*seed 1"):
        vop_jax.load(other, finished / "prompts.safetensors")
    given = load_prompts(finished / "prompts.safetensors")
    assert given.method.visual_prompts == 2


def test_a_workdir_of_another_config(call, finished, tmp_path):
    held = (finished / "prompts.safetensors").read_bytes()
    refused = call("--config.train.learning_rate=0.25", workdir=finished)
    assert_refused(refused, "holds a run with config.train.learning_rate=0.005, not 0.25")
    other = runs.write_clip(tmp_path / "other.safetensors", seed=1)
    assert_refused(call(workdir=finished, clip=other), "holds a run over", "seed 0", "seed 1")
    assert (finished / "prompts.safetensors").read_bytes() == held
    # What does not change the result may change.
    status, _, _ = call("--config.train.log_every=1", "--config.mesh.data=2", workdir=finished)
    assert status == 0


def test_a_workdir_that_learnt_from_other_data(call, finished, folder, tmp_path):
    other = tmp_path / "folder"
    shutil.copytree(folder, other)
    text = (other / "captions.csv").read_text()
    (other / "captions.csv").write_text(text.replace("clip number 2,", "another clip,"))
    held = (finished / "prompts.safetensors").read_bytes()
    records = f"--config.data.records={tmp_path / 'records'}"
    refused = call(records, folder=other, workdir=finished)
    assert_refused(refused, "learnt from other clips or captions than this 'train' split's")
    assert (finished / "prompts.safetensors").read_bytes() == held
    # The same data elsewhere is the same data.
    shutil.copytree(finished / "records", tmp_path / "moved")
    moved = f"--config.data.records={tmp_path / 'moved'}"
    assert call(moved, workdir=finished)[0] == 0


def test_a_workdir_that_learnt_nothing_starts_over_with_another_clip(call, clip, tmp_path):
    zero_shot = "--config.method.name=zero_shot"
    assert call(zero_shot)[0] == 0
    first = summary_of(tmp_path / "run")
    other = runs.write_clip(tmp_path / "other.safetensors", seed=5)
    assert call(zero_shot, clip=other)[0] == 0
    second = summary_of(tmp_path / "run")
    for summary in (first, second):
        assert all(summary["before"][side] == summary[side] for side in ("t2v", "v2t"))
    assert first["before"] != second["before"]


def test_records_need_their_videos_no_more(call, folder, tmp_path):
    moved, zero_shot = tmp_path / "folder", "--config.method.name=zero_shot"
    shutil.copytree(folder, moved)
    assert call(zero_shot, folder=moved)[0] == 0
    shutil.rmtree(moved / "videos")
    assert call(zero_shot, folder=moved)[0] == 0
    assert call(zero_shot, "--config.data.videos=", folder=moved)[0] == 0
    # For a split that they lack videos are asked for.
    records = f"--config.data.records={tmp_path / 'run/records'}"
    lacking = (zero_shot, records, "--config.data.eval_split=val", "--config.data.videos=")
    text = (moved / "captions.csv").read_text()
    (moved / "captions.csv").write_text(text + "9.mp4,more,val\n")
    assert_refused(
        call(*lacking, folder=moved, workdir=tmp_path / "other"), "config.data.videos is not set"
    )
    (moved / "captions.csv").write_text(text)
    # With annotations they are still compared.
    text = (moved / "captions.csv").read_text()
    (moved / "captions.csv").write_text(text.replace("clip number 20,", "another clip,"))
    assert_refused(call(zero_shot, folder=moved), "were made of other clips or captions")


def test_two_runs_in_one_workdir(call, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with filelock.FileLock(workdir / ".lock"):
        assert_refused(call(), "another run is using it")
    assert call("--config.method.name=zero_shot")[0] == 0


def test_a_full_disk(call, tmp_path, monkeypatch):
    from vop_jax.data.records import encode
    from vop_jax.training import checkpoint

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "file"))

    for module, name in ((encode, "_jpeg"), (checkpoint.Checkpoints, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            assert_refused(call(), "no space left on the disk", "the same command continues")
    assert call()[0] == 0


def test_a_batch_of_one_pair_teaches_nothing(call):
    one = ("--config.train.batch_size=1", "--config.mesh.data=1")
    assert_refused(call(*one), "config.train.batch_size=1: the loss compares the clips of a batch")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0.mp4,a clip,train"], "'train': has one clip"),
        (["0.mp4,a clip,train", "1.mp4,a clip,train"], "'train': has the same caption for all"),
    ],
)
def test_data_of_which_nothing_can_be_learnt(call, folder, tmp_path, rows, message):
    (tmp_path / "few.csv").write_text("\n".join(["video,caption,split", *rows, "2.mp4,x,test\n"]))
    assert_refused(call(f"--config.data.annotations={tmp_path / 'few.csv'}"), message)


def test_damaged_videos_are_named_and_left_out(call, folder, tmp_path):
    broken = tmp_path / "folder"
    shutil.copytree(folder, broken)
    (broken / "videos" / "3.mp4").write_bytes(b"")
    videos.write(broken / "videos" / "20.mp4", 1)
    refused = call(folder=broken)
    assert_refused(refused, "split 'train': 1 of 16 videos cannot be used", "3.mp4 (zero bytes)")
    status, out, _ = call("--config.data.max_skipped=0.2", folder=broken)
    assert status == 0 and "skipped videos: 2" in out
    summary = summary_of(tmp_path / "run")
    assert [s["id"] for s in summary["skipped_videos"]] == ["3.mp4", "20.mp4"]
    # A missing video is a miss: it is still asked for, and still counted.
    assert (summary["num_texts"], summary["num_videos"]) == (runs.TEST, runs.TEST)
    assert summary["missing_videos_count_as"] == "miss"
    drop = ("--config.data.max_skipped=0.2", "--config.eval.missing=drop")
    assert call(*drop, folder=broken, workdir=tmp_path / "drop")[0] == 0
    assert summary_of(tmp_path / "drop")["num_videos"] == runs.TEST - 1


def test_captions_that_are_cut_or_say_left_are_counted(call, folder, tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    long = tmp_path / "folder"
    shutil.copytree(folder, long)
    text = (long / "captions.csv").read_text()
    for old, new in (("2,", "clip " * 60), ("3,", "a left turn"), ("17,", "w " * 40 + "left")):
        text = text.replace(f"clip number {old}", f"{new},")
    (long / "captions.csv").write_text(text)
    assert call("--config.train.steps=1", folder=long)[0] == 0
    assert "train: 1 of 16 captions (6.2 %) say left" in caplog.text
    assert "train with --config.data.flip=False" in caplog.text
    assert "cannot be exported with --format=pytorch: the released code" in caplog.text
    assert "train with --config.method.suffix=released" in caplog.text
    caplog.clear()
    assert summary_of(tmp_path / "run")["cut_captions"] == 2
    # Where nothing is trained the training split is not read.
    assert call("--config.train.steps=0", folder=long, workdir=tmp_path / "eval")[0] == 0
    assert "say left" not in caplog.text
    assert summary_of(tmp_path / "eval")["cut_captions"] == 1


def test_divergence_stops_with_where(call, tmp_path):
    status, _, err = call("--config.train.learning_rate=1e38", "--config.train.warmup=0")
    assert status == 1
    assert "at step" in err and "checkpoints keeps the last good state" in err
