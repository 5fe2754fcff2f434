"""An index whose moments are shots."""

import os
import shutil
from unittest import mock

import pytest

from tests.search import library
from tests.video.test_shots import SHOTS, LevelDetector, write_shots
from vop_jax import UserError
from vop_jax.search.__main__ import main
from vop_jax.search.index import Index
from vop_jax.video import shots


@pytest.fixture
def stand_in(monkeypatch):
    """No PySceneDetect is needed."""
    monkeypatch.setattr(shots, "CutDetector", LevelDetector)


def write_films(folder):
    folder.mkdir()
    write_shots(folder / "a.mp4")
    library.write_film(folder / "plain.mp4", 25)
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


def test_an_index_of_shots_follows_its_folder(tmp_path, retriever, clip, stand_in, capsys):
    films, index = write_films(tmp_path / "films"), tmp_path / "index"
    report = library.make(index, films, retriever, clip=str(clip), shots=True)
    assert (report.added, report.failed) == (2, 1)
    before = library.content(index)
    segments = [segment for path, *segment in before if path == "a.mp4"]
    assert sorted(map(tuple, segments)) == sorted([(0.0, 32.0), *SHOTS])
    assert [segment for path, *segment in before if path == "plain.mp4"] == [[0.0, 2.5]]
    main(["info", f"--index={index}"])
    assert "7, shots of 1 to 20 s, 3 frames each" in capsys.readouterr().out
    # Moved, copied, touched and changed files; the call need not say --shots again.
    shutil.copy(films / "a.mp4", films / "copy.mp4")
    (films / "a.mp4").rename(films / "moved.mp4")
    os.utime(films / "moved.mp4")
    write_shots(films / "plain.mp4", (3.0, 4.0))
    report = library.make(index, films, retriever)
    assert (report.added, report.changed, report.moved) == (1, 1, 1)
    after = library.content(index)
    assert len(after) == 15 and ("plain.mp4", 3.0, 7.0) in after
    library.make(tmp_path / "fresh", films, retriever, shots=True)
    library.assert_same(after, library.content(tmp_path / "fresh"))
    with pytest.raises(UserError, match="--shots: not with --window or --stride"):
        library.make(tmp_path / "both", films, retriever, window=2.0, shots=True)
    with pytest.raises(UserError, match="was made without --window, not 2; give another --index"):
        library.make(index, films, retriever, window=2.0)


def test_an_index_of_windows_has_no_shots(copied, retriever, monkeypatch, tmp_path):
    films, index = copied
    with pytest.raises(UserError, match="was made without --shots; give another --index"):
        library.make(index, films, retriever, shots=True)
    assert not Index(index).info.shots
    broken = mock.Mock(side_effect=ImportError("libGL.so.1: no such file"))
    monkeypatch.setattr(shots, "CutDetector", broken)
    line = r'need PySceneDetect \(libGL.so.1: no such file\): pip install -e "\.\[shots\]"'
    with pytest.raises(UserError, match=line):
        library.make(tmp_path / "new", films, retriever, shots=True)
    assert not (tmp_path / "new").exists()


def test_processes_detect_shots(tmp_path, retriever):
    pytest.importorskip("scenedetect", reason="needs the extra shots")
    films = write_films(tmp_path / "films")
    library.make(tmp_path / "index", films, retriever, shots=True, processes=True)
    assert {("a.mp4", *segment) for segment in SHOTS} < library.content(tmp_path / "index").keys()
