"""The benchmarks of search, in small."""

import json
import sys

from benchmarks import index, search
from tests.video import videos


def run(module, monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    module.main()
    return capsys.readouterr().out


def test_stores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        search, "in_a_fresh_process", lambda name, *args: getattr(search, name)(*args)
    )
    argv = (f"--index={tmp_path}/index", "--rows=300", "--dim=16", "--batch=128", "--repeats=2")
    text = run(search, monkeypatch, capsys, *argv)
    assert "| put 300 in batches of 128 |" in text and "as brute force finds | yes" in text
    assert "NumPy, all at once" in run(search, monkeypatch, capsys, *argv, "--ways")


def test_catalogs(tmp_path, monkeypatch, capsys):
    argv = ("catalog", f"--index={tmp_path}/i", "--moments=600", "--per_file=3")
    opened, counts, *rows = map(json.loads, run(index, monkeypatch, capsys, *argv).splitlines())
    assert opened.keys() == {"open_ms", "first_search_ms"}
    assert (counts["files"], counts["moments"]) == (200, 600)
    assert len(rows) == 14 and all(row["search_ms"] > 0 for row in rows)


def test_decoding(tmp_path, monkeypatch, capsys):
    videos.write(tmp_path / "a.mp4", 30)
    argv = ("decoding", tmp_path, "--window=1", "--workers=1", "--repeat=1", "--rounds=1")
    rows = map(json.loads, run(index, monkeypatch, capsys, *argv).splitlines())
    assert [row["how"] for row in rows] == ["processes", "threads", "processes, one by one"]
