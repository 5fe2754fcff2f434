"""The converter's command line: its files, its messages, its exit statuses."""

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

SCRIPT = Path(__file__).parents[1] / "tools" / "convert_clip_weights.py"
STATE = checkpoints.openai_state(SIZES)
HEADS = ["--vision-heads=2", "--text-heads=1"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "open_clip.safetensors"
    safetensors_numpy.save_file(STATE, path)
    return path


def refused(capsys, *argv):
    """The one line of a call that ends with status 2."""
    assert convert.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_the_script_runs_from_any_folder_without_the_package_installed(source, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), f"--source={source.name}", "--output=new/clip.st"]
    done = processes.run([*command, *HEADS], cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: nothing states the activation" in done.stdout
    weights = load_clip(tmp_path / "new" / "clip.st")
    assert weights.config == SIZES and weights.source == source.name
    assert weights.name in done.stdout
    metadata = tensors.read_metadata(tmp_path / "new" / "clip.st")
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["fingerprint"] == tensors.fingerprint(weights.params)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.st"], "nothing else is left"


def test_a_released_checkpoint_gives_clip_and_prompts(tmp_path, capsys):
    pytest.importorskip("torch", reason="writes a PyTorch file")
    state = checkpoints.released_state(STATE, 3, 5)
    released = checkpoints.save_torch(tmp_path / "VoP.pth", state, "state_dict")
    clip, prompts = tmp_path / "clip.safetensors", tmp_path / "prompts.safetensors"
    argv = [f"--source={released}", f"--output={clip}"]
    assert convert.main(argv) == 0
    assert "--prompts-output=FILE writes them" in capsys.readouterr().out
    assert convert.main([*argv, f"--prompts-output={prompts}"]) == 0
    assert "3 visual, 2 + 3 text prompts" in capsys.readouterr().out
    weights, saved = load_clip(clip), load_prompts(prompts)
    check_same_clip(prompts, saved, weights.fingerprint, weights.name, weights.config)
    assert saved.clip_name == weights.name
    assert saved.clip_config == weights.config == SIZES
    lengths = saved.method.suffix, saved.method.text_prefix, saved.method.text_suffix
    assert lengths == ("released", 2, 3)
    stated = {"tp_prefix_token_num": 4, "tp_suffix_token_num": 1, "num_frames": 8}
    (tmp_path / "configuration.json").write_text(json.dumps({"hyperparam": stated}))
    assert convert.main([*argv, f"--prompts-output={prompts}"]) == 0
    assert "3 visual, 4 + 1 text prompts" in capsys.readouterr().out
    saved = load_prompts(prompts)
    assert (saved.method.text_prefix, saved.method.text_suffix) == (4, 1)
    assert saved.video == {"frames": 8}


def test_a_converted_clip_is_verified(source, tmp_path, capsys):
    """With flags for what nothing states."""
    clip = tmp_path / "clip"
    flags = ["--activation=gelu", "--vision-heads=4", "--text-heads=5"]
    assert convert.main([f"--source={source}", f"--output={clip}", *flags]) == 0
    config = load_clip(clip).config
    assert (config.activation, config.vision_heads, config.text_heads) == ("gelu", 4, 5)
    assert convert.main([f"--verify={clip}"]) == 0
    assert load_clip(clip).name in capsys.readouterr().out.splitlines()[-1]
    clip.write_bytes(clip.read_bytes()[:-1] + b"\1")
    assert "damaged" in refused(capsys, f"--verify={clip}")
    for other in (f"--source={source}", "--ema", "--text-heads=2"):
        assert "no other option" in refused(capsys, f"--verify={clip}", other)


def test_a_name_is_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="writes a PyTorch file")
    archive = checkpoints.save_torchscript(tmp_path / "served.pt", STATE, SIZES)
    body = archive.read_bytes()
    published = hashlib.sha256(body).hexdigest(), "ViT-B-32.pt"
    monkeypatch.setitem(download.PUBLISHED, "ViT-B/32", published)
    with serving(body) as (url, _):
        flags = [f"--cache={tmp_path / 'cache'}", f"--base-url={url}"]
        assert convert.main(["--source=ViT-B/32", f"--output={tmp_path / 'clip'}", *flags]) == 0
    assert (tmp_path / "cache" / "ViT-B-32.pt").read_bytes() == body
    assert load_clip(tmp_path / "clip").source == "ViT-B-32.pt"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source=a"], "--output"),
        (["--source=a", "--output=b", "--sauce=c"], "--sauce"),
        (["--source=a", "--output=b", "--activation=relu"], "quick_gelu"),
        (["--source=a", "--output=b", "--text-heads=0"], "--text-heads"),
        (["--source=a", "--output=b", "--vision-heads=x"], "--vision-heads"),
        (["--source=a", "--output=a"], "different files"),
        (["--source=a", "--output=b", "--prompts-output=b"], "different files"),
        (["--source=a", "--output=/"], "--output=/: is a directory"),
        (["--source=ViT-B/33", "--output=b"], "ViT-B/33: no such file; names"),
    ],
)
def test_a_wrong_call_is_one_line(argv, message, capsys):
    assert message in refused(capsys, *argv)


def test_a_failure_is_one_line_and_leaves_no_output(source, tmp_path, capsys, monkeypatch):
    output = tmp_path / "clip"
    argv = [f"--source={source}", f"--output={output}", *HEADS]
    error = refused(capsys, *argv, f"--prompts-output={tmp_path / 'prompts'}")
    assert "holds no prompts" in error
    assert str(source) in refused(capsys, f"--source={source}", f"--output={source}/clip", *HEADS)

    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(convert, "save_clip", fail)
        assert "No space left on device" in refused(capsys, *argv)
    source.write_bytes(source.read_bytes()[:-5])
    assert str(source) in refused(capsys, *argv)
    assert not output.exists()
