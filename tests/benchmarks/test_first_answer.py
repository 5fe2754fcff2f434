"""The benchmark of whole processes, without its processes."""

import pytest

from benchmarks import first_answer
from vop_jax.search.searcher import open_searcher

PARTS = ["imports of a query", "query, empty cache", "query, filled cache"]
PARTS += ["serve until ready, empty cache", "serve until ready, filled cache", "params"]


def test_every_part_is_a_row(monkeypatch, capsys):
    """Over an index that a query can open."""
    commands = []

    def run(command, env, until_line=False):
        commands.append(command)
        return float(len(commands)), 1.0

    monkeypatch.setattr(first_answer, "run", run)
    first_answer.main(["--arch=tiny", "--repeats=2"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == PARTS
    assert rows[0] == "| imports of a query | 10.00 | 7.00 | 1.00 |"  # without the first repeat
    assert len(commands) == 3 * len(PARTS)


def test_the_index_can_be_searched(tmp_path):
    index = first_answer.write_index(tmp_path, "tiny", "float32")
    assert len(open_searcher(index).text("a dog", k=3, per_file=False)) == 3


def test_a_process_that_fails_is_reported():
    with pytest.raises(SystemExit, match="ended with status 3"):
        first_answer.run(["-c", "import sys; sys.exit(3)"], {})
