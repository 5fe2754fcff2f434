"""Runs with the training frames on the devices learn what runs from records learn."""

import json
import shutil

import pytest

from tests import runs
from vop_jax.training.writer import read_metrics

CACHE = "--config.data.device_cache_gb=1"

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def call(folder, clip):
    """(workdir, overrides) -> the exit status."""

    def call(workdir, *overrides):
        return runs.call(*runs.arguments(folder, clip, workdir, *overrides))

    return call


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


@pytest.mark.slow
@pytest.mark.parametrize("override", ["mesh.data=1", "data.augment=False"])
def test_a_run_from_the_cache_is_the_run_from_records(call, tmp_path, override):
    """Up to the rounding of crops on the device."""
    for name, cache in (("records", "0"), ("cache", "1")):
        settings = (f"--config.{override}", f"--config.data.device_cache_gb={cache}")
        assert call(tmp_path / name, *settings) == 0
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "records"), abs=2e-3)
    assert len(losses(tmp_path / "records")) == 3


def test_a_run_from_records_is_continued_from_the_cache(call, tmp_path):
    """Also with captions in narrower batches."""
    expected, run = tmp_path / "records", tmp_path / "run"
    assert call(expected) == 0
    shutil.copytree(expected, run)
    shutil.rmtree(run / "checkpoints/4")
    (run / "prompts.safetensors").unlink()
    assert call(run, CACHE, "--config.data.text_buckets=(8,12)") == 0
    # The first step after a start is logged too.
    found = losses(run)
    assert found.pop(3) and found == pytest.approx(losses(expected), abs=2e-3)
    assert json.loads((run / "config.json").read_text())["data"]["device_cache_gb"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--config.data.device_cache_gb=1e-6",), "16 clips of 3 frames of 32 x 32 pixels take"),
        ((CACHE, "--config.data.sampling=rand", "--config.data.stored_fps=10"), "sampling='rand'"),
    ],
)
def test_what_the_cache_cannot_do(call, tmp_path, capsys, overrides, message):
    assert call(tmp_path, *overrides) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "config.data.device_cache_gb" in line and message in line and "set it to 0" in line
