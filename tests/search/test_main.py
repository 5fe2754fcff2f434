"""The command line: right and wrong calls, kills, and what it prints."""

import contextlib
import functools
import io
import json
import os
import re
import signal
import sys

import pytest

from tests import processes, runs
from tests.search import library
from vop_jax.inference import retriever as retrievers
from vop_jax.search import build, catalog, searcher, updater
from vop_jax.search.__main__ import main


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """Every call shares the model, and what is compiled for it."""
    with pytest.MonkeyPatch.context() as patch:
        load = functools.cache(functools.partial(retrievers.load, devices=1))
        patch.setattr(retrievers, "load", load)
        patch.setattr(searcher, "load", load)
        yield


@pytest.fixture
def call(capsys):
    def run(*argv):
        status = main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory, clip):
    """(films, index), by the command line; one film is removed afterwards."""
    root = tmp_path_factory.mktemp("main")
    library.write_films(root / "films")
    (root / "films/bad.mp4").write_bytes(b"no video")
    (root / "empty").mkdir()
    (root / "texts.txt").write_text("first text\nsecond text\n")
    argv = ["index", root / "films", "--clip", clip, "--index", root / "index", "--window=2"]
    argv += ["--workers=1", "--captions", root / "texts.txt"]
    assert main([str(arg) for arg in argv]) == 0
    (root / "films/sub/b.mp4").unlink()
    return root / "films", root / "index"


def test_index_reports_what_it_did(place, call, tmp_path):
    again = library.copy(place[1], tmp_path / "again")
    status, out, _ = call("index", "--index", again)
    assert status == 0
    assert re.match(rf"{again}: 1 removed, 4 unchanged\n", out)
    assert "not readable: 1, first bad.mp4 (not readable as video" in out


def test_query_as_json(place, call):
    films, index = place

    def query(*argv):
        status, out, _ = call("query", *argv, "--index", index, "--json")
        assert status == 0
        return json.loads(out)

    rows = query("a dog", "-k", 3)
    assert len(rows) == 3
    for row in rows:
        assert row.keys() == {"path", "score", "start", "end", "missing"}
        assert row["missing"] == row["path"].endswith("b.mp4")
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    rows = query("a dog", "--all-moments", "--folder=sub")
    assert len(rows) > 2 and all("/sub/" in row["path"] for row in rows)
    assert {row["path"][-5:] for row in query("a dog", "--since=2023-11-17")} == {"d.mp4"}
    film = ["--video", films / "c.mp4"]
    assert query(*film, "-k1")[0]["path"] == str(films / "c.mp4")
    captions = {row["caption"] for row in query(*film, "--to=captions")}
    assert captions == {"first text", "second text"}
    for row in query("a dog", "--explain"):
        if row["missing"]:
            assert row["unexplained"].endswith("b.mp4: no such file")
        else:
            seconds = [frame["seconds"] for frame in row["frames"]]
            assert len(seconds) == 12 and row["start"] <= seconds[0] <= seconds[-1] < row["end"]


def test_query_as_a_table(place, call):
    films, index = place
    status, out, err = call("query", "a dog", "--index", index)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 4 and not err
    assert all(re.match(r"-?0\.\d{3} +\d\.\d-\d\.\d s  /", line) for line in lines)
    assert sum(line.endswith("b.mp4  (missing)") for line in lines) == 1
    for nothing in ("--folder=none", "--min_score=1"):
        assert call("query", "a dog", "--index", index, nothing)[1] == "nothing found\n"
    assert call("query", "a dog", "--index", index, "--min_score=1", "--json")[1] == "[]\n"
    assert "b.mp4: no such file" in call("query", "a dog", "--index", index, "--explain")[1]
    _, out, _ = call("query", "--video", films / "c.mp4", "--index", index, "--to=captions")
    assert {line.split("  ")[-1] for line in out.splitlines()} == {"first text", "second text"}
    _, _, err = call("query", "word " * 50, "--index", index)
    assert err == "the query is longer than the model reads: its end is ignored\n"


def test_many_queries_and_files_of_results(place, call, tmp_path):
    index = place[1]
    texts = ["a dog", "a cat, asleep", "word " * 50]
    (tmp_path / "queries").write_text("\ufeff" + "\n\n".join(texts) + "\n")
    many = ["query", "--queries", tmp_path / "queries", "--index", index, "-k2"]
    status, out, err = call(*many, "--json")
    assert status == 0 and err == (
        "1 of 3 queries are longer than the model reads: their ends are ignored\n"
    )
    rows = json.loads(out)
    assert [row["query"] for row in rows] == [text.strip() for text in texts]
    for text, row in zip(texts, rows, strict=True):
        alone = json.loads(call("query", text, "--index", index, "-k2", "--json")[1])
        assert row["found"] and [hit["path"] for hit in row["hits"]] == [h["path"] for h in alone]
        for hit, other in zip(row["hits"], alone, strict=True):
            assert hit["score"] == pytest.approx(other["score"], abs=2e-4)
    blocks = call(*many)[1].split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [text.strip() for text in texts]
    for name in ("new/rows.csv", "rows.JSON"):
        status, out, _ = call(*many, "--out", tmp_path / name)
        assert (status, out) == (0, f"{tmp_path / name}: 6 results\n")
    assert json.loads((tmp_path / "rows.JSON").read_text()) == rows
    lines = (tmp_path / "new/rows.csv").read_text().splitlines()
    assert lines[0].startswith("query,path,score") and lines[3].startswith('"a cat, asleep",/')
    assert call(*many, "--format=csv")[1].splitlines() == lines


def test_info(place, call):
    films, index = place
    status, out, _ = call("info", "--index", index)
    assert status == 0
    assert re.search(r"files +4\n", out) and "of 2 s every 1 s, 12 frames each" in out
    assert "bad.mp4: not readable as video" in out and "minimum   none: fewer than 50" in out
    info = json.loads(call("info", "--index", index, "--json")[1])
    assert info["counts"]["captions"] == 2 and info["folder"] == str(films)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("search x --index INDEX", "invalid choice: 'search'"),
        ("query x", "give --index=DIR, or --store=http://HOST:PORT#NAME"),
        ("query x --index INDEX --store http://h:1", "not with --index, which names its store"),
        ("query --index INDEX", "give one of: a text, --video=FILE, --image=FILE"),
        ("query x --image y --index INDEX", "give one of"),
        ("query '' --index INDEX", "the query is empty"),
        ("query x --queries y --index INDEX", "give one of"),
        ("query --queries ROOT/none.txt --index INDEX", "none.txt: No such file"),
        ("query --queries ROOT/films/bad.mp4 --index ROOT", "no index"),
        ("query --queries /dev/null --index INDEX", "no queries in it; give one a line"),
        ("query x --index INDEX --out=ROOT/new", "ends in none of .json, .csv, .otio; give --form"),
        ("query x --index INDEX --out=ROOT/films --format=csv", "films: a folder; give a file"),
        ("query x --index INDEX --json --format=csv", "--json: not with --format=csv"),
        ("query x --index INDEX --explain --format=csv", "needs --format table or json, not csv"),
        ("query x --index INDEX --to=captions --out=x.otio", "a timeline of moments; not with"),
        ("query x --index INDEX -k 0", "'0': a number, 1 or more"),
        ("query x --index INDEX --to=sounds", "invalid choice: 'sounds'"),
        ("query x --index INDEX --to=captions --explain", "--explain: scores the frames of videos"),
        ("query x --index INDEX --since=never", "since='never': must be a date"),
        ("query x --index INDEX --min_score=2", "min_score='2': must be auto, none or a number"),
        ("query x --index ROOT", "no index; make one with python -m vop_jax.search index"),
        ("query --video ROOT/none.mp4 --index INDEX", "none.mp4: no such file"),
        ("query --image ROOT/films/bad.mp4 --index INDEX", "not readable as a picture"),
        ("query x --index INDEX --clip ROOT/none", "missing, but"),
        ("info --index ROOT/none", "no index"),
        ("index ROOT/films --index ROOT/new", "give the model, --clip and --prompts"),
        ("index --index ROOT/new --clip CLIP", "name the folder of videos"),
        ("index ROOT/none --index ROOT/new --clip CLIP", "no such folder of videos"),
        ("index ROOT/empty --index ROOT/new --clip CLIP", "no videos in this folder"),
        ("index ROOT/films --index ROOT/texts.txt --clip CLIP", "a file; an index is a folder"),
        ("index ROOT/films --index ROOT --clip CLIP", "holds empty, but no index"),
        ("NEW --stride=1", "needs --window"),
        ("NEW --window=1 --stride=2", "at most --window=1"),
        ("NEW --captions=ROOT/none.txt", "No such file"),
        ("NEW --store=ftp://x", "must be a local folder"),
        ("index ROOT/films --index INDEX --window=9", "made with --window=2, not 9"),
        ("index ROOT/films --index ROOT/new --clip ROOT/none", "none: no such file"),
        ("index ROOT/films --index INDEX --window=0", "--window: '0': a number, 0.001 or more"),
    ],
)
def test_wrong_calls(place, call, clip, argv, message):
    films, index = place
    argv = argv.replace("NEW", "index ROOT/films --index ROOT/new --clip CLIP")
    words = [word.strip("'") for word in argv.split()]
    for name, path in (("ROOT", films.parent), ("INDEX", index), ("CLIP", clip)):
        words = [word.replace(name, str(path)) for word in words]
    status, out, err = call(*words)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (films.parent / "new").exists()


def test_an_index_without_captions(place, call, tmp_path):
    index = library.copy(place[1], tmp_path / "index")
    with catalog.connect(index / catalog.FILE) as db:
        db.executescript("DELETE FROM captions; PRAGMA application_id = 0")
    db.close()
    status, _, err = call("query", "x", "--to=captions", "--index", index)
    assert status == 2 and "has no captions; add them with index --captions=FILE" in err


def test_a_full_disk_and_files_that_disappear(place, call, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "vectors.f32")

    monkeypatch.setattr(build, "build_index", full)
    assert call("index", "--index", place[1])[::2] == (
        2,
        "error: vectors.f32: no space left on the disk; free some, the same command continues\n",
    )
    report = updater.IndexReport(unchanged=3, skipped={"a.mp4": "no such file"})
    monkeypatch.setattr(build, "build_index", lambda *_: report)
    status, out, _ = call("index", "--index", place[1])
    assert status == 1 and "not read: 1, first a.mp4 (no such file); their indexed" in out


def committed(index):
    with contextlib.suppress(Exception), catalog.reading(index) as db:
        return db.execute("SELECT COUNT(*) FROM files").fetchone()[0]
    return 0


def test_a_killed_and_an_interrupted_run_lose_nothing(tmp_path, clip, call, monkeypatch):
    """Killed while it waits for a pipe with the name of a video, interrupted by its next commit."""
    films, index = tmp_path / "films", tmp_path / "index"
    library.write_films(films, 5, seconds=2)
    os.mkfifo(films / "z.mp4")
    command = ["index", films, "--clip", clip, "--index", index]
    command += ["--window=1", "--workers=1", "--batch=1", "--dtype=float32"]
    argv = [sys.executable, "-m", "vop_jax.search", *map(str, command)]
    process = processes.Process(argv, env=runs.environment())
    processes.until(lambda: committed(index) >= 1, process)
    process.kill()
    process.wait()
    killed = committed(index)
    (films / "z.mp4").unlink()
    library.write_film(films / "z.mp4", 20)

    def add_and_interrupt(self, files):
        add(self, files)
        signal.raise_signal(signal.SIGINT)

    add = updater.Updater._add
    with monkeypatch.context() as patch:
        patch.setattr(updater.Updater, "_add", add_and_interrupt)
        status, _, err = call(*command)
    assert status == 130 and "stopped by SIGINT; the same command continues" in err
    count = committed(index)
    assert 1 <= killed < count
    status, out, _ = call("index", "--index", index)
    assert status == 0 and f"{count} unchanged" in out
    library.make(tmp_path / "whole", films, None, clip=str(clip), window=1.0)
    library.assert_same(library.content(index), library.content(tmp_path / "whole"))


NAME = "a\x1b]0;title\x07\x9b2J\r\n\u202e\u20ac\xe9.mp4"
SHOWN = r"a\x1b]0;title\x07\x9b2J\r\n\u202e€é.mp4"


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory, clip):
    """An index of files and captions that hold control characters."""
    root = tmp_path_factory.mktemp("names")
    (folder := root / "films \udcff\x1b[2J").mkdir()
    library.write_film(folder / NAME, 20)
    (folder / f"bad {NAME}").write_bytes(b"no video")
    (root / "captions.txt").write_text("one\x1b[2Jtext\n")
    library.make(root / "index", folder, None, root / "captions.txt", clip=str(clip))
    return root / "index"


@pytest.mark.parametrize(
    ("argv", "lines", "encoding"),
    [
        (["query", "a dog", "--until", "9999-12-31"], 1, "utf-8"),
        (["query", "a dog", "--to", "captions"], 1, "ascii"),
        (["query", "a dog", "--since", "0001-01-01", "--json"], 9, "ascii"),
        (["query", "a dog", "--clip", NAME], 1, "utf-8"),
        (["info"], 10, "ascii"),
        (["index"], 2, "utf-8"),
    ],
)
def test_a_terminal_obeys_no_name(odd_names, monkeypatch, argv, lines, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        status = main([*argv, "--index", str(odd_names)])
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert status == (2 if "--clip" in argv else 0), err
    text = err if status else out
    assert len(text.splitlines()) == lines
    assert all(c == "\n" or c.isprintable() for c in out + err)
    if argv[-1] in ("9999-12-31", "info", "index"):
        assert (SHOWN if encoding == "utf-8" else ascii(SHOWN)[1:-1].replace("\\\\", "\\")) in text
