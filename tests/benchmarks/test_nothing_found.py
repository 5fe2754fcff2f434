"""The benchmark of searches that find nothing, in small."""

import sys

import pytest

from benchmarks import nothing_found
from tests import runs
from vop_jax.data.datasets import clips
from vop_jax.inference import retriever


@pytest.mark.slow
def test_the_table(tmp_path, monkeypatch, capsys):
    clips.render(str(tmp_path / "videos"), train=8, val=0, test=56)
    runs.write_clip(tmp_path / "clip.safetensors")
    monkeypatch.setattr(nothing_found, "load", lambda clip, prompts: retriever.load(clip, frames=2))
    monkeypatch.setattr(nothing_found, "COLOURS", ("red",))
    monkeypatch.setattr(nothing_found, "SHAPES", ("circle",))
    monkeypatch.setattr(sys, "argv", ["nothing_found", str(tmp_path)])
    nothing_found.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:4]] == ["56", "45"]
    assert len(lines) == 7
