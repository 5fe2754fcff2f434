"""The table of speed on a tiny CLIP: every variant runs, a variant that fails says so."""

import json
import sys

import pytest

pytest.importorskip("torch", reason="half of the table is PyTorch's")

from benchmarks import speed
from tests import tiny
from vop_jax.config.clip import PRESETS


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """(options) -> (what --json writes, what is printed)."""
    monkeypatch.setitem(PRESETS, "tiny", tiny.CLIP)

    def run(*options):
        path = tmp_path / "speed.json"
        sizes = ["--arch=tiny", "--frames=3", "--repeats=2", "--matmul=64", f"--json={path}"]
        monkeypatch.setattr(sys, "argv", ["speed", *sizes, "--compile_modes", *options])
        speed.main()
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


# The tiny CLIP has 20 positions, 8 of them prompts.
@pytest.mark.slow
def test_both_frameworks_have_a_row_of_everything(call):
    found, printed = call("--methods", "vop_f")
    rows = found["rows"]
    assert [(r["what"], r["variant"]) for r in rows] == [
        (what, variant)
        for what in ("forward", "step", "evaluation")
        for variant in ("JAX", "PyTorch eager")
    ]
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in rows)
    assert all(r["videos"] == (8 if r["what"] == "evaluation" else 2) for r in rows)
    forward, step, evaluation = rows[::2]
    assert 1.5 * forward["flops"] < step["flops"] < 3.5 * forward["flops"]
    assert evaluation["flops"] == 4 * forward["flops"]
    assert step["peak_bytes"] > forward["peak_bytes"] > 0 and rows[1]["peak_bytes"] is None
    table = [line for line in printed.splitlines() if line.startswith("| vop_f")]
    assert len(table) == len(rows) and "| 1.00 |" in table[0]


def test_a_variant_that_fails_says_so_and_the_others_go_on(call, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no | compiler\nhere")

    monkeypatch.setattr(speed.torch, "compile", broken)
    found, printed = call("default", "--methods", "vop", "--what", "forward")
    *others, failed = found["rows"]
    assert failed["error"] == "RuntimeError: no | compiler here" and "seconds" not in failed
    assert [len(row["seconds"]) for row in others] == [2, 2]
    assert "RuntimeError: no / compiler here" in printed


def test_a_program_that_does_not_compile_leaves_the_peers_time(call, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed.Programs, "_compiled", broken)
    ours, theirs = call("--methods", "vop", "--what", "forward")[0]["rows"]
    assert ours["error"] == "RuntimeError: out of memory"
    assert len(theirs["seconds"]) == 2 and theirs["flops"] > 0


def test_without_torch_the_table_is_of_jax(call, monkeypatch):
    monkeypatch.setattr(speed, "torch", None)
    ours, theirs = call("--methods", "vop", "--what", "forward")[0]["rows"]
    assert len(ours["seconds"]) == 2 and theirs["error"].endswith("torch is not installed")


def test_an_evaluation_is_of_whole_batches(call, capsys):
    with pytest.raises(SystemExit):
        call("--eval_videos=3")
    assert "--eval_videos=3: not a multiple of --batch=2" in capsys.readouterr().err
