"""The command line: as a user calls it, rightly and wrongly, and kills it."""

import contextlib
import json
import re
import signal

import pytest

from tests import processes, runs
from tests.search import library
from vop_jax.search import catalog, updater
from vop_jax.search.__main__ import main


@pytest.fixture(autouse=True)
def signals_of_the_tests():
    with runs.kept_signals():
        yield


@pytest.fixture
def call(capsys):
    def run(*argv):
        status = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory, clip):
    """(films, index), by the command line; one film has vanished since."""
    root = tmp_path_factory.mktemp("main")
    library.write_films(root / "films")
    (root / "films/bad.mp4").write_bytes(b"no video")
    (root / "texts.txt").write_text("first text\nsecond text\n")
    with runs.kept_signals():
        status = main(
            [
                *(
                    "index",
                    str(root / "films"),
                    "--clip",
                    str(clip),
                    "--index",
                    str(root / "index"),
                ),
                *("--window=2", "--workers=1", "--captions", str(root / "texts.txt")),
            ]
        )
    assert status == 0
    (root / "films/sub/b.mp4").unlink()
    return root / "films", root / "index"


def test_index_tells_what_came_of_it(place, call):
    _, index = place
    again = library.copy(index, index.parent / "again")
    status, out, _ = call("index", "--index", again)
    assert status == 0
    assert re.match(rf"{again}: 1 removed, 4 unchanged\n", out)
    assert "not readable: 1, first bad.mp4 (not readable as video" in out


def test_query_as_json(place, call):
    _, index = place
    status, out, _ = call("query", "a dog", "--index", index, "-k", 3, "--json")
    rows = json.loads(out)
    assert status == 0 and len(rows) == 3
    for row in rows:
        assert row.keys() == {"path", "score", "start", "end", "missing"}
        assert row["missing"] == row["path"].endswith("b.mp4")
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    _, out, _ = call("query", "a dog", "--index", index, "--json", "--all-moments", "--folder=sub")
    assert len(json.loads(out)) > 2 and "/sub/" in out and "a.mp4" not in out
    _, out, _ = call("query", "a dog", "--index", index, "--json", "--since=2023-11-17")
    assert {row["path"][-5:] for row in json.loads(out)} == {"d.mp4"}


def test_query_as_a_table(place, call):
    _, index = place
    status, out, _ = call("query", "a dog", "--index", index)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 4
    assert all(re.match(r"-?0\.\d{3} +\d\.\d-\d\.\d s  /", line) for line in lines)
    assert sum(line.endswith("b.mp4  (missing)") for line in lines) == 1
    assert call("query", "a dog", "--index", index, "--folder=none")[1] == "nothing found\n"


def test_query_explained(place, call):
    _, index = place
    _, out, _ = call("query", "a dog", "--index", index, "--json", "--explain")
    for row in json.loads(out):
        if row["missing"]:
            assert row["unexplained"].endswith("b.mp4: no such file")
        else:
            seconds = [frame["seconds"] for frame in row["frames"]]
            assert len(seconds) == 12 and row["start"] <= seconds[0] <= seconds[-1] < row["end"]
    assert "b.mp4: no such file" in call("query", "a dog", "--index", index, "--explain")[1]


def test_the_ways_back(place, call):
    films, index = place
    _, out, _ = call("query", "--video", films / "c.mp4", "--index", index, "--json", "-k1")
    assert json.loads(out)[0]["path"] == str(films / "c.mp4")
    _, out, _ = call("query", "--video", films / "c.mp4", "--index", index, "--to=captions")
    assert {line.split("  ")[-1] for line in out.splitlines()} == {"first text", "second text"}
    _, out, _ = call(
        "query", "--video", films / "c.mp4", "--index", index, "--to=captions", "--json"
    )
    assert {row["caption"] for row in json.loads(out)} == {"first text", "second text"}


def test_info(place, call):
    films, index = place
    status, out, _ = call("info", "--index", index)
    assert status == 0
    assert re.search(r"files +4\n", out) and "of 2 s every 1 s, 12 frames each" in out
    assert "bad.mp4: not readable as video" in out
    about = json.loads(call("info", "--index", index, "--json")[1])
    assert about["counts"]["captions"] == 2 and about["folder"] == str(films)


def test_a_long_query_is_cut_and_that_is_said(place, call):
    status, out, err = call("query", "word " * 50, "--index", place[1], "--json")
    assert status == 0 and json.loads(out)
    assert err == "the query is longer than the model reads: its end is cut off\n"
    assert call("query", "word", "--index", place[1])[2] == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("search x --index INDEX", "invalid choice: 'search'"),
        ("query x", "the following arguments are required: --index"),
        ("query --index INDEX", "give one of: a text, --video=FILE, --image=FILE"),
        ("query x --image y --index INDEX", "give one of"),
        ("query '' --index INDEX", "the query is empty"),
        ("query x --index INDEX -k 0", "'0': a number, 1 or more"),
        ("query x --index INDEX --to=sounds", "invalid choice: 'sounds'"),
        ("query x --index INDEX --since=never", "since='never': must be a date"),
        ("query x --index ROOT", "no index; make one with python -m vop_jax.search index"),
        ("query --video ROOT/none.mp4 --index INDEX", "none.mp4: no such file"),
        ("query --image ROOT/films/bad.mp4 --index INDEX", "not readable as a picture"),
        ("query x --index INDEX --clip ROOT/none", "gone since"),
        ("info --index ROOT/none", "no index"),
        ("index ROOT/films --index ROOT/new", "give the model, --clip and --prompts"),
        ("index --index ROOT/new --clip CLIP", "name the folder of videos"),
        ("index ROOT/none --index ROOT/new --clip CLIP", "no such folder of videos"),
        ("index ROOT/films --index INDEX --window=9", "made with --window=2, not 9"),
        ("index ROOT/films --index ROOT/new --clip ROOT/none", "none: no such file"),
        ("index ROOT/films --index INDEX --window=0", "--window: '0': a number, 0.001 or more"),
    ],
)
def test_calls_that_are_wrong(place, call, clip, argv, message):
    films, index = place
    words = [word.strip("'") for word in argv.split()]
    for name, path in (("ROOT", films.parent), ("INDEX", index), ("CLIP", clip)):
        words = [word.replace(name, str(path)) for word in words]
    status, out, err = call(*words)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_what_an_index_was_made_without(place, call, clip, retriever, tmp_path):
    index = tmp_path / "plain"
    library.make(index, place[0], retriever, clip=str(clip))
    status, _, err = call("query", "x", "--to=captions", "--index", index)
    assert status == 2 and "plain: has no captions; index --captions=FILE" in err
    status, _, err = call("index", place[0], "--index", index, "--window=9")
    assert status == 2 and "made without --window, not 9" in err


def test_a_full_disk_is_told_in_one_line(place, call, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", "vectors.f32")

    index = library.copy(place[1], tmp_path / "index")
    monkeypatch.setattr("vop_jax.search.build._update", full)
    status, _, err = call("index", "--index", index)
    assert (status, err) == (
        2,
        "error: vectors.f32: no space left on the disk; free some, the same command continues\n",
    )


def test_files_that_went_away_are_told_by_the_status(place, call, monkeypatch):
    skipped = updater.Done(unchanged=3, skipped={"a.mp4": "no such file"})
    monkeypatch.setattr("vop_jax.search.build.make_index", lambda *_: skipped)
    status, out, _ = call("index", "--index", place[1])
    assert status == 1 and "not read: 1, first a.mp4 (no such file); what is indexed" in out


def committed(index):
    with contextlib.suppress(Exception), catalog.reading(index) as db:
        return db.execute("SELECT COUNT(*) FROM files").fetchone()[0]
    return 0


def started(index, films, clip, files):
    """A process that makes an index, when it has finished so many files."""
    process = library.start(
        *("index", films, "--clip", clip, "--index", index),
        *("--window=1", "--workers=1", "--batch=1"),
    )
    processes.until(lambda: committed(index) >= files, process)
    return process


@pytest.fixture(scope="module")
def many(tmp_path_factory, clip):
    """(films, content of an index that nothing disturbed)."""
    root = tmp_path_factory.mktemp("many")
    library.write_films(root / "films", 20)
    whole = library.start(
        *("index", root / "films", "--clip", clip, "--index", root / "index"),
        *("--window=1", "--workers=1", "--batch=1"),
    )
    assert whole.wait() == 0, whole.communicate()
    whole.communicate()
    return root / "films", library.content(root / "index")


def test_kills_lose_nothing(many, clip, tmp_path):
    films, whole = many
    index = tmp_path / "index"
    for files in (1, 7):
        process = started(index, films, clip, files)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    kept = committed(index)
    assert 7 <= kept < 20
    process = library.start("index", "--index", index)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{20 - kept} added, {kept} unchanged" in out
    library.assert_same(library.content(index), whole)


def test_ctrl_c_keeps_what_is_done(many, clip, tmp_path):
    process = started(tmp_path / "index", many[0], clip, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "stopped by SIGINT; the same command continues" in err
    assert "Traceback" not in err
    assert 3 <= committed(tmp_path / "index") < 20
    process = library.start("index", "--index", tmp_path / "index")
    assert process.wait() == 0, process.communicate()
    process.communicate()
    library.assert_same(library.content(tmp_path / "index"), many[1])
