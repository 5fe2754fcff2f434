"""The benchmark of the index, in small."""

import json
import sys

from tests import processes
from tests.runs import ROOT
from tests.video import videos


def run(*argv):
    command = [sys.executable, "-m", "benchmarks.index", *map(str, argv)]
    done = processes.run(command, cwd=ROOT, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_catalogs(tmp_path):
    opened, counts, *rows = run("catalog", f"--index={tmp_path}/i", "--moments=600", "--per_file=3")
    assert opened.keys() == {"open_ms", "first_search_ms"}
    assert (counts["files"], counts["moments"]) == (200, 600)
    assert len(rows) == 14 and all(row["search_ms"] > 0 for row in rows)


def test_decodings(tmp_path):
    videos.write(tmp_path / "a.mp4", 30)
    rows = run("decoding", tmp_path, "--window=1", "--workers=1", "--repeat=1", "--rounds=1")
    assert [row["how"] for row in rows] == ["processes", "threads", "processes, one by one"]
