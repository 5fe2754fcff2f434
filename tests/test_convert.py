"""The converter's command line: its files, its messages, its exit statuses."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

import vop_jax
from tests import checkpoints, processes
from tests.checkpoints import SIZES
from tests.reference_methods import Reference, unit
from vop_jax import convert
from vop_jax.clip.convert import download
from vop_jax.clip.weights import load_clip
from vop_jax.config.clip import PRESETS
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.storage import tensors
from vop_jax.tuning.prompt_set import load_prompts, released_method

SCRIPT = Path(__file__).parents[1] / "tools" / "convert_clip_weights.py"
PARAMS = checkpoints.random_params(SIZES)
STATE = checkpoints.openai_state(PARAMS)
TOLERANCE = 1e-5  # of the largest difference between unit features; 1e-4 is required
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
    assert weights.fingerprint == tensors.fingerprint(PARAMS)
    metadata = tensors.read_metadata(tmp_path / "new" / "clip.st")
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.st"], "nothing else is left"


@pytest.mark.parametrize(
    ("sizes", "visual", "text"),
    [(SIZES, 3, 5), pytest.param(PRESETS["ViT-B/32"], 8, 8, marks=pytest.mark.slow)],
    ids=["odd", "ViT-B/32"],
)
def test_a_released_checkpoint_gives_clip_and_prompts(sizes, visual, text, tmp_path, capsys):
    """Loaded, they have the features of the reference."""
    pytest.importorskip("torch", reason="writes a PyTorch file")
    params = checkpoints.random_params(sizes)
    learnt = checkpoints.random_prompts(sizes, visual, text)
    state = checkpoints.released_state(checkpoints.openai_state(params), learnt)
    released = checkpoints.save_torch(tmp_path / "VoP.pth", state, "state_dict")
    clip, prompts = tmp_path / "clip.safetensors", tmp_path / "prompts.safetensors"
    argv = [f"--source={released}", f"--output={clip}"]
    assert convert.main(argv) == 0
    assert "--prompts-output=FILE writes them" in capsys.readouterr().out
    assert convert.main([*argv, f"--prompts-output={prompts}"]) == 0
    prefix, suffix = text // 2, text - text // 2
    assert f"{visual} visual, {prefix} + {suffix} text prompts" in capsys.readouterr().out
    weights, saved = load_clip(clip), load_prompts(prompts)
    assert saved.method == released_method(visual, text)
    assert (saved.method.suffix, saved.method.text_prefix) == ("released", prefix)
    assert (saved.clip_name, saved.clip_config) == (weights.name, sizes)

    retriever = vop_jax.load(clip, prompts)
    flat = {f"clip/{name}": leaf for name, leaf in params.items()}
    flat |= {f"prompts/{name}": leaf for name, leaf in learnt.items()}
    depth = {"visual": sizes.vision_layers, "text": sizes.text_layers}
    reference = Reference(flat, saved.method, depth, sizes.patch_size)
    texts = ["a squid is talking", "", "a very long caption " * 20]
    ids = CaptionTokenizer(saved.method.text_slots(sizes)).with_truncation(texts)[0]
    expected = np.array([reference.text(row) for row in ids])
    assert np.abs(retriever.embed_text(texts) - expected).max() <= TOLERANCE
    shape = (2, 3, sizes.image_size, sizes.image_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = unit(np.array([reference.frames(video).mean(axis=0) for video in frames]))
    assert np.abs(retriever.embed_frames(frames) - expected).max() <= TOLERANCE

    stated = {"tp_prefix_token_num": text - 1, "tp_suffix_token_num": 1, "num_frames": 8}
    (tmp_path / "configuration.json").write_text(json.dumps({"hyperparam": stated}))
    assert convert.main([*argv, f"--prompts-output={prompts}"]) == 0
    assert f"{visual} visual, {text - 1} + 1 text prompts" in capsys.readouterr().out
    saved = load_prompts(prompts)
    assert (saved.method.text_prefix, saved.method.text_suffix) == (text - 1, 1)
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


def test_a_name_is_downloaded(source, tmp_path, monkeypatch):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(download.PUBLISHED, "ViT-B/32", (digest, "ViT-B-32.pt"))
    (tmp_path / digest).mkdir()
    source.rename(tmp_path / digest / "ViT-B-32.pt")
    flags = [f"--cache={tmp_path / 'cache'}", f"--base-url={tmp_path.as_uri()}", *HEADS]
    assert convert.main(["--source=ViT-B/32", f"--output={tmp_path / 'clip'}", *flags]) == 0
    assert (tmp_path / "cache" / "ViT-B-32.pt").exists()
    assert load_clip(tmp_path / "clip").source == "ViT-B-32.pt"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source=a"], "--output"),
        (["--source=a", "--output=b", "--sauce=c"], "--sauce"),
        (["--source=a", "--output=b", "--activation=relu"], "quick_gelu"),
        (["--source=a", "--output=b", "--text-heads=0"], "--text-heads"),
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

    monkeypatch.setattr(convert, "save_clip", fail)
    assert "No space left on device" in refused(capsys, *argv)
    assert not output.exists()
