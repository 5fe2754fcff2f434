"""Runs with the frames on the devices learn what runs from records learn, to the bit."""

import json
import shutil

import pytest

from tests import runs
from vop_jax.training.writer import read_metrics

CACHE = "--config.data.device_cache_gb=1"


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(folder, clip)"""
    root = tmp_path_factory.mktemp("inputs")
    return runs.write_folder(root), runs.write_clip(root / "clip.safetensors")


@pytest.fixture(scope="module")
def records(inputs, tmp_path_factory):
    """A finished run from records."""
    workdir = tmp_path_factory.mktemp("records")
    assert runs.call(*runs.arguments(*inputs, workdir)) == 0
    return workdir


def call(inputs, workdir, *overrides):
    return runs.call(*runs.arguments(*inputs, workdir, *overrides))


def learnt(workdir):
    losses = [line["loss"] for line in read_metrics(workdir) if "loss" in line]
    return losses, (workdir / "prompts.safetensors").read_bytes()


def test_a_run_from_the_cache_is_the_run_from_records(inputs, records, tmp_path):
    assert call(inputs, tmp_path, CACHE) == 0
    assert learnt(tmp_path) == learnt(records)
    assert len(learnt(tmp_path)[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("--config.mesh.data=1",), ("--config.data.augment=False",)])
def test_also_on_one_device_and_without_augmentation(inputs, records, tmp_path, overrides):
    assert call(inputs, tmp_path / "records", *overrides) == 0
    assert call(inputs, tmp_path / "cache", CACHE, *overrides) == 0
    assert learnt(tmp_path / "cache") == learnt(tmp_path / "records")
    if "augment" in overrides[0]:
        assert learnt(tmp_path / "cache") != learnt(records)


def test_a_run_from_records_is_continued_from_the_cache(inputs, records, tmp_path):
    shutil.copytree(records, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    (tmp_path / "run/prompts.safetensors").unlink()
    assert call(inputs, tmp_path / "run", CACHE) == 0
    assert learnt(tmp_path / "run")[1] == learnt(records)[1]
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["device_cache_gb"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--config.data.device_cache_gb=1e-6",), "16 clips of 3 frames of 32 x 32 pixels take"),
        ((CACHE, "--config.data.sampling=rand", "--config.data.stored_fps=10"), "sampling='rand'"),
    ],
)
def test_what_the_cache_cannot_do(inputs, tmp_path, capsys, overrides, message):
    assert call(inputs, tmp_path, *overrides) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "config.data.device_cache_gb" in line and message in line and "set it to 0" in line


def test_text_buckets_on_the_command_line(inputs, records, tmp_path):
    assert call(inputs, tmp_path, "--config.data.text_buckets=(8,12)") == 0
    losses, _ = learnt(tmp_path)
    assert losses == pytest.approx(learnt(records)[0], abs=1e-5)
