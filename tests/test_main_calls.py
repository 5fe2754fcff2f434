"""The command line without a finished run: wrong calls get one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import runs
from tests.runs import assert_refused
from vop_jax import main
from vop_jax.experiment import train
from vop_jax.storage import files
from vop_jax.training.loop import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("quiet")


def test_params_need_neither_weights_nor_workdir(tmp_path, capsys):
    table = tmp_path / "params.json"
    assert runs.call("--config=folder", "--mode=params", f"--json={table}") == 0
    assert "122,880" in capsys.readouterr().out
    counts = json.loads(table.read_text())
    assert counts["vop"] == {
        "trainable": 122880,
        "paper": 122880,
        "percent": pytest.approx(0.1025, abs=1e-3),
    }
    assert counts["full"] == {"trainable": 151277313, "paper": 119826432, "percent": 100.0}


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("--config.trian.steps=3", ("config.trian.steps: no such key; did you mean config.train",)),
        ("--config.train.steps=many", ("--config.train.steps=many: must be a whole number",)),
        ("--config.data.flip=perhaps", ("--config.data.flip=perhaps: must be True or False",)),
        ("--config.train.batch_size=0", ("config.train.batch_size=0: must be 1 or more",)),
        ("--config.compute.remat=all", ("allowed are none, dots, full",)),
        ("--config.log.to=comet", ("config.log.to='comet': allowed are tensorboard, wandb",)),
        (
            "--config.log.profile=3,9",
            ("config.log.profile=(3, 9): must be first,last", "train.steps=4"),
        ),
        ("--config.log.profile=2", ("config.log.profile=", "must be first,last")),
        ("--config.method.name=vopp", ("method.name='vopp'", "vop")),
        ("--config.method.first_layer=9", ("first_layer=9", "layers 1 to 2")),
        ("--config.method.text_prefix=40", ("text_prefix",)),
        ("--config.data.kind=foldr", ("config.data.kind='foldr'", "did you mean 'folder'?")),
        ("--config.data.eval_split=val", ("config.data.eval_split='val'", "train (16), test (8)")),
        ("--config.data.annotations=no.csv", ("no.csv: no such annotation file",)),
        ("--config.data.annotations=", ("config.data.annotations is not set",)),
        ("--config.data.videos=nowhere", ("nowhere: no such folder of videos",)),
        ("--config.data.records=FILE", ("captions.csv: not a folder to write records in",)),
        ("--config.init.clip=no.safetensors", ("no.safetensors: no such file",)),
        ("--config.init.clip=", ("config.init.clip is not set", "convert")),
        ("--config.init.clip=OTHER", ("not a converted CLIP",)),
        ("--config.init.clip=FILE", ("captions.csv: not a readable safetensors file",)),
        ("--config.init.prompts=no.safetensors", ("no.safetensors: no such file",)),
        ("--config.clip.arch=ViT-B/32", ("config.clip.arch=ViT-B/32", "seed 0")),
        ("--config.clip.activation=gelu", ("config.clip.activation=gelu", "quick_gelu")),
        ("--config.train.microbatches=2", ("does not divide the 1 of train.batch_size=8",)),
        ("--config.mesh.data=99", ("config.mesh.data=99", "devices")),
        ("--config.train.batch_size=9", ("config.train.batch_size=9", "8 devices")),
        ("--config.train.batch_size=1 --config.mesh.data=1", ("of one it is always 0",)),
        ("--mode=deploy", ("deploy", "train")),
        ("--mdoe=train", ("--mdoe: no such flag; did you mean --mode?",)),
        ("train", ("train: not a flag",)),
        ("--mode=eval", ("no checkpoint; train first, or set config.init.prompts",)),
        (
            "--mode=eval --config.init.clip= --config.pretrain.steps=1",
            ("no clip.safetensors yet; train first",),
        ),
        ("--mode=export", ("no checkpoint; train first",)),
        ("--mode=export --format=onnx", ("onnx", *main.FORMATS)),
        ("--format=orbax", ("--format goes with --mode=export, not with --mode=train",)),
        ("--config=demo", ("--config: give one file",)),
        ("--workdir=FILE", ("captions.csv: not a folder to write in",)),
        ("--workdir=", ("--workdir=DIR is missing",)),
    ],
)
def test_wrong_calls_get_one_line(call, folder, tmp_path, override, messages):
    """They leave no new workdir."""
    override = override.replace("=FILE", f"={folder / 'captions.csv'}")
    save_file({"visual": np.zeros(2)}, tmp_path / "other.safetensors")
    override = override.replace("=OTHER", f"={tmp_path / 'other.safetensors'}")
    assert_refused(call(*override.split()), *messages)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        (None, ("--config=FILE is missing, and --workdir=x holds no run; shipped", "demo")),
        ("no.py", ("--config=no.py: no such file; shipped configs are", "demo, didemo")),
        ("def get_config():\n    raise RuntimeError('boom')\n", ("c.py:2: RuntimeError: boom",)),
        ("def get_config(:\n", ("c.py:1: SyntaxError",)),
        ("def get_config():\n    return {'seed': 1}\n", ("must return base_config()",)),
        ("x = 1\n", ("the file defines no get_config()",)),
        ("open('lost.txt')\n", ("c.py:1: FileNotFoundError", "lost.txt")),
    ],
)
def test_a_config_file_that_is_missing_or_wrong(tmp_path, capsys, config, messages):
    argv = ["--workdir=x"]
    if config is not None and "\n" in config:
        (tmp_path / "c.py").write_text(config)
        argv += ["--config", str(tmp_path / "c.py")]
    elif config is not None:
        argv += [f"--config={config}"]
    assert_refused((runs.call(*argv), "", capsys.readouterr().err), *messages)


def test_a_busy_workdir(call, tmp_path):
    with files.folder_lock(tmp_path / "run", "busy"):
        assert_refused(call(), "another run is using it")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0.mp4,a clip,train"], "'train': has one clip"),
        (["0.mp4,a clip,train", "1.mp4,a clip,train"], "'train': has the same caption for all"),
    ],
)
def test_data_of_which_nothing_can_be_learned(call, tmp_path, rows, message):
    few = tmp_path / "few.csv"
    few.write_text("\n".join(["video,caption,split", *rows, "2.mp4,x,test\n"]))
    assert_refused(call(f"--config.data.annotations={few}"), message)


def test_divergence_stops_with_where(call, monkeypatch):
    def diverge(*args):
        raise NonFiniteLoss("loss is inf at step 5")

    monkeypatch.setattr(train, "train", diverge)
    status, _, err = call()
    assert status == 1
    assert "loss is inf at step 5" in err and "checkpoints keeps the last good state" in err
