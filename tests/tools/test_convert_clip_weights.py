"""The command line of the converter: what it writes, what it says, how it ends."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from tests import checkpoints, processes
from tests.checkpoints import SIZES
from tests.server import serving
from vop_jax import convert
from vop_jax.clip.convert import download
from vop_jax.clip.weights import load_clip
from vop_jax.storage import tensors
from vop_jax.tuning.prompt_set import check_same_clip, load_prompts

SCRIPT = Path(__file__).parents[2] / "tools" / "convert_clip_weights.py"
STATE = checkpoints.openai_state(SIZES)
HEADS = ["--vision-heads=2", "--text-heads=1"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "open_clip.safetensors"
    safetensors_numpy.save_file(STATE, path)
    return path


@pytest.fixture
def released(tmp_path):
    pytest.importorskip("torch", reason="writes a PyTorch file")
    state = checkpoints.released_state(STATE, 3, 5)
    return checkpoints.save_torch(tmp_path / "VoP.pth", state, "state_dict")


def refused(capsys, *argv):
    """The one line of a call that ends with status 2."""
    assert convert.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_runs_from_any_folder_without_the_package_installed(source, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), f"--source={source.name}", "--output=new/clip.st"]
    done = processes.run([*command, *HEADS], cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: nothing states the activation" in done.stdout
    weights = load_clip(tmp_path / "new" / "clip.st")
    assert weights.config == SIZES
    assert weights.name in done.stdout
    assert weights.source == source.name
    metadata = tensors.read_metadata(tmp_path / "new" / "clip.st")
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["fingerprint"] == tensors.fingerprint(weights.params)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.st"], "nothing else is left"


def test_writes_clip_and_prompts_of_a_released_checkpoint(released, tmp_path, capsys):
    clip, prompts = tmp_path / "clip.safetensors", tmp_path / "prompts.safetensors"
    argv = [f"--source={released}", f"--output={clip}", f"--prompts-output={prompts}"]
    assert convert.main(argv) == 0
    assert "3 visual, 2 + 3 text prompts a layer" in capsys.readouterr().out
    weights, found = load_clip(clip), load_prompts(prompts)
    check_same_clip(prompts, found, weights.fingerprint, weights.name, weights.config)
    assert found.clip_name == weights.name
    assert found.clip_config == weights.config == SIZES
    assert found.method.suffix == "released"
    assert (found.method.text_prefix, found.method.text_suffix) == (2, 3)


def test_prompts_have_the_lengths_that_are_stated(released, tmp_path, capsys):
    stated = {"tp_prefix_token_num": 4, "tp_suffix_token_num": 1, "num_frames": 8}
    (tmp_path / "configuration.json").write_text(json.dumps({"hyperparam": stated}))
    prompts = tmp_path / "prompts.safetensors"
    flags = [f"--output={tmp_path / 'clip'}", f"--prompts-output={prompts}"]
    assert convert.main([f"--source={released}", *flags]) == 0
    assert "3 visual, 4 + 1 text prompts a layer" in capsys.readouterr().out
    found = load_prompts(prompts)
    assert (found.method.text_prefix, found.method.text_suffix) == (4, 1)
    assert found.video == {"frames": 8}


def test_verifies_a_converted_clip(source, tmp_path, capsys):
    clip = tmp_path / "clip.safetensors"
    assert convert.main([f"--source={source}", f"--output={clip}", *HEADS]) == 0
    assert convert.main([f"--verify={clip}"]) == 0
    assert load_clip(clip).name in capsys.readouterr().out.splitlines()[-1]
    clip.write_bytes(clip.read_bytes()[:-1] + b"\1")
    assert "damaged" in refused(capsys, f"--verify={clip}")
    for other in (f"--source={source}", "--ema", "--text-heads=2"):
        assert "no other option" in refused(capsys, f"--verify={clip}", other)


def test_says_that_prompts_were_left(released, tmp_path, capsys):
    assert convert.main([f"--source={released}", f"--output={tmp_path / 'clip'}"]) == 0
    assert "--prompts-output=FILE writes them" in capsys.readouterr().out


def test_flags_reach_the_config(source, tmp_path):
    flags = ["--activation=gelu", "--vision-heads=4", "--text-heads=5"]
    assert convert.main([f"--source={source}", f"--output={tmp_path / 'clip'}", *flags]) == 0
    config = load_clip(tmp_path / "clip").config
    assert (config.activation, config.vision_heads, config.text_heads) == ("gelu", 4, 5)


def test_a_name_is_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="writes a PyTorch file")
    archive = checkpoints.save_torchscript(tmp_path / "served.pt", STATE, SIZES)
    body = archive.read_bytes()
    monkeypatch.setitem(
        download.PUBLISHED, "ViT-B/32", (hashlib.sha256(body).hexdigest(), "ViT-B-32.pt")
    )
    with serving(body) as (url, _):
        flags = [f"--cache={tmp_path / 'cache'}", f"--base-url={url}"]
        assert convert.main(["--source=ViT-B/32", f"--output={tmp_path / 'clip'}", *flags]) == 0
    assert (tmp_path / "cache" / "ViT-B-32.pt").read_bytes() == body
    assert load_clip(tmp_path / "clip").source == "ViT-B-32.pt"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--source=a"], "--output"),
        (["--source=a", "--output=b", "--sauce=c"], "--sauce"),
        (["--source=a", "--output=b", "--activation=relu"], "quick_gelu"),
        (["--source=a", "--output=b", "--text-heads=0"], "--text-heads=0"),
        (["--source=a", "--output=b", "--vision-heads=x"], "--vision-heads"),
        (["--source=a", "--output=a"], "different files"),
        (["--source=a", "--output=b", "--prompts-output=b"], "different files"),
        (["--source=a", "--output=/"], "--output=/: is a directory"),
        (["--source=ViT-B/33", "--output=b"], "ViT-B/33: no such file; names"),
    ],
)
def test_a_wrong_call_is_one_line(argv, named, capsys):
    assert named in refused(capsys, *argv)


def test_a_place_that_cannot_be_written_is_one_line(source, capsys):
    error = refused(capsys, f"--source={source}", f"--output={source}/clip")
    assert str(source) in error


def test_a_full_disk_is_one_line(source, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(convert, "save_clip", full)
    message = refused(capsys, f"--source={source}", f"--output={tmp_path / 'x'}", *HEADS)
    assert "No space left on device" in message


def test_a_refused_source_leaves_no_output(source, tmp_path, capsys):
    output = tmp_path / "clip"
    with_prompts = [f"--prompts-output={tmp_path / 'prompts'}", *HEADS]
    error = refused(capsys, f"--source={source}", f"--output={output}", *with_prompts)
    assert "holds no prompts" in error
    source.write_bytes(source.read_bytes()[:-5])
    error = refused(capsys, f"--source={source}", f"--output={output}")
    assert str(source) in error
    assert not output.exists()
