"""--mode=export in every format, each read back."""

import dataclasses
import errno
import json
import os
import re
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

import vop_jax
from tests import readers, runs
from tests.runs import assert_refused
from vop_jax import main
from vop_jax.clip.convert.pytorch import convert
from vop_jax.clip.weights import load_clip
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.experiment import export as exports
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import partition
from vop_jax.tuning.prompt_set import PromptSet, check_released, load_prompts, save_prompts

BASE = MethodConfig("vop", visual_prompts=2, text_prefix=1, text_suffix=1, frames=3)
CONTEXT = dataclasses.replace(BASE, name="vop_f+c", specific_prompts=1)
RELEASED = dataclasses.replace(BASE, suffix="released")
TEXTS = ["a squid is talking", "", "two dogs", "word " * 40, "a man sings into the night"]
VIDEO = {
    "frames": 3,
    "sampling": "uniform",
    "short_side": 32,
    "stored_fps": 0.0,
    "folder_fps": 0.0,
}


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def trained(clip, tmp_path):
    """Writes random prompts of a method as a run would have learnt them."""

    def trained(method, clip=clip):
        weights, rng = load_clip(clip), np.random.default_rng(0)
        shapes = tensors.unflatten(TextVideoModel(weights.config, method).shapes())
        draw = {
            name: rng.normal(0, 0.3, leaf.shape).astype(np.float32)
            for name, leaf in tensors.flatten(
                partition(shapes, method.trainable_patterns(weights.config))[0]
            ).items()
        }
        about = weights.fingerprint, weights.name, weights.config, VIDEO
        prompts = PromptSet(tensors.unflatten(draw), method, *about)
        save_prompts(tmp_path / "given.safetensors", prompts)
        return tmp_path / "given.safetensors"

    return trained


@pytest.fixture
def export(clip, tmp_path, capsys):
    """Calls --mode=export of a run that starts from prompts; (status, stdout, stderr)."""

    def export(prompts, method, *overrides, clip=clip):
        settings = {k: v for k, v in dataclasses.asdict(method).items() if k != "frames"}
        argv = runs.arguments(tmp_path, clip, tmp_path / "run", "--mode=export", *overrides)
        argv += [f"--config.method.{key}={value}" for key, value in settings.items()]
        status = runs.call(*argv, f"--config.init.prompts={prompts}")
        captured = capsys.readouterr()
        return status, captured.out.strip(), captured.err

    return export


def rows(*counts):
    """(frames, ids) in batches of these sizes."""
    rng, size = np.random.default_rng(1), runs.CLIP.image_size
    frames = [rng.integers(0, 256, (n, 3, size, size, 3), dtype=np.uint8) for n in counts]
    slots = BASE.text_slots(runs.CLIP)
    return frames, [CaptionTokenizer(slots).with_truncation(TEXTS[:n])[0] for n in counts]


def test_the_command_line_and_python_know_the_same_formats():
    assert set(main.FORMATS) == set(exports.FORMATS)
    with pytest.raises(vop_jax.UserError, match="--format=onnx: allowed are safetensors, "):
        exports.check("onnx")


@pytest.mark.parametrize("name", ["vop_f+c", "bias"])
def test_an_orbax_folder_is_read_wherever_prompts_are(clip, trained, export, name):
    """By `vop_jax.load`, by a run, and by orbax itself."""
    method = dataclasses.replace(BASE, name=name, specific_prompts=1)
    given = trained(method)
    status, path, err = export(given, method, "--format=orbax")
    assert status == 0 and path.endswith("run/prompts.orbax"), err
    ours, theirs = load_prompts(given), load_prompts(path)
    assert theirs.fingerprint == ours.fingerprint
    assert dataclasses.replace(theirs, params={}) == dataclasses.replace(ours, params={})
    assert vop_jax.load(clip, path).prompts_fingerprint == ours.fingerprint
    status, again, err = export(path, method)
    assert status == 0 and again.endswith("run/prompts.safetensors")  # the default
    assert load_prompts(again).fingerprint == ours.fingerprint, err
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path + "/params")
    assert tensors.fingerprint(restored) == tensors.fingerprint(ours.params)


def test_a_folder_that_holds_no_prompts(clip, tmp_path):
    (tmp_path / "videos").mkdir()
    with pytest.raises(vop_jax.UserError, match="videos: not an orbax folder of this project"):
        vop_jax.load(clip, tmp_path / "videos")


@pytest.mark.parametrize(
    "method", [BASE, pytest.param(CONTEXT, marks=pytest.mark.slow)], ids=lambda m: m.name
)
def test_encoders_run_without_us(clip, trained, export, tmp_path, method):
    pytest.importorskip("flatbuffers", reason="with which jax writes programs")
    given = trained(method)
    status, path, err = export(given, method, "--format=stablehlo")
    assert status == 0, err
    encoders = tmp_path / "run/encoders"
    assert path == str(encoders)
    frames, ids = rows(1, 3)
    found = readers.embed(encoders, tmp_path, video=frames, text=ids)
    retriever = vop_jax.load(clip, given)
    for count, batch, video, text in zip(
        (1, 3), frames, found["video"], found["text"], strict=True
    ):
        np.testing.assert_allclose(video, retriever.embed_frames(batch), atol=1e-6)
        np.testing.assert_allclose(text, retriever.embed_text(TEXTS[:count]), atol=1e-6)
    meta = json.loads((encoders / "meta.json").read_text())
    assert meta["prompts_fingerprint"] == retriever.prompts_fingerprint
    assert meta["clip_fingerprint"] == retriever.clip_fingerprint
    assert (meta["frames"], meta["image_size"], meta["text_slots"]) == (3, 16, 22)


@pytest.fixture(scope="module")
def released_clip(tmp_path_factory):
    """With the heads that the released code would give it."""
    config = dataclasses.replace(runs.CLIP, vision_heads=1, text_heads=1)
    return runs.write_clip(tmp_path_factory.mktemp("released") / "clip.safetensors", 0, config)


def test_what_is_trained_as_released_is_exported_whole(released_clip, trained, export, tmp_path):
    """To the authors' model and back, by the settings that the docs name."""
    torch = pytest.importorskip("torch", reason="writes PyTorch files")
    method = dataclasses.replace(RELEASED, text_prefix=2, text_suffix=2)
    given, path = trained(method, released_clip), tmp_path / "run/vop.pt"
    status, printed, err = export(given, method, "--format=pytorch", clip=released_clip)
    assert status == 0 and printed == str(path), err
    state = torch.load(path, weights_only=True)["state_dict"]
    # What is there under two names takes the place of one.
    once = sum({t.data_ptr(): t.nbytes for t in state.values()}.values())
    assert once < path.stat().st_size < 1.5 * once
    # Converted back, all bits are the same.
    first, again = load_clip(released_clip), convert(path)
    assert again.config == first.config
    assert tensors.fingerprint(again.params) == tensors.fingerprint(first.params)
    learnt = load_prompts(given).params["prompts"]
    assert tensors.fingerprint(again.prompts) == tensors.fingerprint(learnt)


@pytest.mark.parametrize(
    ("form", "writer"),
    [("orbax", "orbax.checkpoint.Checkpointer.save"), ("pytorch", "torch.save")],
)
def test_a_full_disk_leaves_what_was_there(
    released_clip, trained, export, tmp_path, monkeypatch, form, writer
):
    if form == "pytorch":
        pytest.importorskip("torch", reason="writes PyTorch files")
    given = trained(RELEASED, released_clip)
    names = {"orbax": "prompts.orbax", "pytorch": "vop.pt"}
    path = tmp_path / "run" / names[form]
    older = path if form == "pytorch" else path / "older"
    older.parent.mkdir(parents=True)
    older.write_text("older")

    def full(*args, **kwargs):
        for handed in args:
            if hasattr(handed, "write"):
                handed.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def call():
        return export(given, RELEASED, f"--format={form}", clip=released_clip)

    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        assert_refused(call(), "no space left on the disk")
    assert older.read_text() == "older"
    assert not list((tmp_path / "run").rglob(".*partial*"))
    assert call()[0] == 0
    assert not older.exists() or older.read_bytes() != b"older"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "vop_f"},
            "method.name='vop', not 'vop_f'; train with --config.method.name=vop",
        ),
        ({"suffix": "eot"}, "not 'eot'; train with --config.method.suffix=released"),
        (
            {"text_prefix": 2, "text_suffix": 0},
            "method.text_prefix=1, not 2; train with --config.method.text_prefix=1",
        ),
        ({"branches": "text"}, "holds prompts of both towers"),
        ({"visual_prompts": 0}, "holds prompts of both towers"),
        ({"last_layer": 1}, "last_layer=0, not 1; train with --config.method.last_layer=0"),
        ({}, "CLIP's vision_heads=1, not 2; train over a CLIP such as"),
    ],
)
def test_what_the_released_code_cannot_compute_is_refused(changes, message):
    method = dataclasses.replace(RELEASED, **changes)
    with pytest.raises(vop_jax.UserError, match=re.escape(message)):
        check_released(method, runs.CLIP)


@pytest.mark.parametrize(
    ("method", "form", "missing", "messages"),
    [
        (
            *(dataclasses.replace(BASE, name="zero_shot"), "orbax", ""),
            ["--format=orbax: method zero_shot trains nothing"],
        ),
        (
            *(BASE, "stablehlo", "flatbuffers"),
            ["--format=stablehlo", "flatbuffers", 'pip install -e ".[export]"'],
        ),
        (
            *(RELEASED, "pytorch", "torch"),
            ["--format=pytorch needs torch", 'pip install -e ".[convert]"'],
        ),
        (BASE, "pytorch", "", ["train with --config.method.suffix=released"]),
    ],
)
def test_what_a_format_cannot_hold_or_needs(
    trained, export, monkeypatch, method, form, missing, messages
):
    """The method, or the package of an extra."""
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    elif form == "pytorch":
        pytest.importorskip("torch", reason="checked before the method")
    assert_refused(export(trained(method), method, f"--format={form}"), *messages)
