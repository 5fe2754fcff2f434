"""What reaches a terminal of names that anybody gave."""

import io
import sys

import pytest

from tests import runs
from tests.search import library
from tests.video import videos
from vop_jax.search.__main__ import main

NAME = "a\x1b]0;title\x07\x9b2J\r\n\u202e\u20ac\xe9.mp4"
SHOWN = r"a\x1b]0;title\x07\x9b2J\r\n\u202e€é.mp4"


@pytest.fixture(scope="module")
def index(tmp_path_factory, clip):
    """Of a film and of a file that is none, in a folder whose name is not UTF-8."""
    root = tmp_path_factory.mktemp("show")
    (folder := root / "films \udcff\x1b[2J").mkdir()
    videos.write(folder / NAME, 20, width=32, height=32)
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
        (["info"], 9, "ascii"),
        (["index"], 2, "utf-8"),
    ],
)
def test_no_name_is_obeyed_by_a_terminal(index, monkeypatch, argv, lines, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    with runs.kept_signals():
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        status = main([*argv, "--index", str(index)])
        monkeypatch.undo()
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert status == (2 if "--clip" in argv else 0), err
    text = err if status else out
    assert len(text.splitlines()) == lines
    assert all(c == "\n" or c.isprintable() for c in out + err)
    if argv[-1] in ("9999-12-31", "info", "index"):
        assert (SHOWN if encoding == "utf-8" else ascii(SHOWN)[1:-1].replace("\\\\", "\\")) in text
