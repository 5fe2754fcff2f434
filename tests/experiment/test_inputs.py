"""Runs with the training frames on the devices learn what runs from records learn."""

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
    """The workdir of a finished run from records."""
    workdir = tmp_path_factory.mktemp("records")
    assert call(inputs, workdir) == 0
    return workdir


def call(inputs, workdir, *overrides):
    return runs.call(*runs.arguments(*inputs, workdir, *overrides))


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["--config.data.text_buckets=(8,12)"], id="narrow captions"),
        pytest.param(["--config.mesh.data=1"], marks=pytest.mark.slow),
        pytest.param(["--config.data.augment=False"], marks=pytest.mark.slow),
    ],
)
def test_a_run_from_the_cache_is_the_run_from_records(inputs, records, tmp_path, overrides):
    """Up to the rounding of crops on the device; also with other widths of captions."""
    expected = records
    if "buckets" not in overrides[0]:
        expected = tmp_path / "records"
        assert call(inputs, expected, *overrides) == 0
    assert call(inputs, tmp_path / "cache", CACHE, *overrides) == 0
    assert losses(tmp_path / "cache") == pytest.approx(losses(expected), abs=2e-3)
    assert len(losses(expected)) == 3


def test_a_run_from_records_is_continued_from_the_cache(inputs, records, tmp_path):
    shutil.copytree(records, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    (tmp_path / "run/prompts.safetensors").unlink()
    assert call(inputs, tmp_path / "run", CACHE) == 0
    # The first step after a start is logged too.
    found = losses(tmp_path / "run")
    assert found.pop(3) and found == pytest.approx(losses(records), abs=2e-3)
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
