"""An index follows its folder."""

import contextlib
import dataclasses
import errno
import os
import shutil
import sqlite3

import numpy as np
import pytest

import vop_jax.search
from tests.search import library, treacherous
from tests.video import videos
from vop_jax import UserError
from vop_jax.search import catalog, decoder, updater
from vop_jax.search.__main__ import format_report
from vop_jax.search.build import IndexRequest, absolute, build_index, locked
from vop_jax.search.index import Index
from vop_jax.search.searcher import open_searcher
from vop_jax.search.writer import CatalogWriter
from vop_jax.video import moments


@pytest.fixture
def films(tmp_path, shared):
    """A copy: encoded again, a film may have other bytes."""
    return shutil.copytree(shared[0], tmp_path / "films")


def test_clips_and_moments_are_embedded_as_the_retriever_does(shared, retriever):
    folder, index = shared
    vectors = library.content(index)
    assert len({path for path, *_ in vectors}) == 4
    segments = sorted((start, end) for path, start, end in vectors if path == "sub/b.mp4")
    assert segments == [(0, 1), (0, 3.1), (0.5, 1.5), (1, 2), (1.5, 2.5), (2, 3), (2.1, 3.1)]
    for (path, start, end), vector in vectors.items():
        frames = np.stack(retriever.sample(folder / path, start, end).pixels)
        np.testing.assert_allclose(vector, retriever.embed_frames(frames[None])[0], atol=1e-5)
    whole = retriever.embed_videos([folder / "a.mp4"])[0]
    np.testing.assert_allclose(vectors["a.mp4", 0.0, 3.0], whole, atol=1e-5)


@pytest.fixture
def no_decoding(monkeypatch):
    """Fails where a file is opened."""

    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(updater.Updater, "_decode", refuse)
    return monkeypatch


def test_an_index_follows_its_folder(tmp_path, retriever, monkeypatch):
    films, index = tmp_path / "films", tmp_path / "index"
    library.write_films(films, 6)
    (films / "locked").mkdir()
    shutil.copy(films / "a.mp4", films / "locked")
    assert library.make(index, films, retriever).added == 7
    before = library.content(index)
    (films / "sub/deeper").mkdir()
    (films / "a.mp4").rename(films / "sub/deeper/renamed.mp4")
    (films / "sub/b.mp4").unlink()
    (films / "c.mp4").rename(films / "x")  # two files exchange their names
    (films / "sub/d.mp4").rename(films / "c.mp4")
    (films / "x").rename(films / "sub/d.mp4")
    library.write_film(films / "e.mp4", 45)
    shutil.copy(films / "sub/f.mp4", films / "copy.mp4")
    os.utime(films / "sub/f.mp4")
    library.write_film(films / "new.mp4", 21)
    embedded, embed, scandir = [], type(retriever).embed_frames, os.scandir

    def count(self, clips):
        embedded.append(len(clips))
        return embed(self, clips)

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(type(retriever), "embed_frames", count)
        patch.setattr(os, "scandir", refuse)
        report = library.make(index, films, retriever)
    text = format_report(Index(index), report)
    assert (
        "folders that cannot be listed: 1, first locked (Permission denied); their indexed files"
        in text
    )
    assert (report.added, report.changed, report.moved, report.removed) == (2, 3, 1, 1)
    assert report.unchanged == 1  # touched
    assert sum(embedded) == 3  # e, new, and one of the two that exchanged their names
    after = library.content(index)
    np.testing.assert_array_equal(after["sub/deeper/renamed.mp4", 0, 3], before["a.mp4", 0, 3])
    np.testing.assert_array_equal(after["copy.mp4", 0, 3.5], before["sub/f.mp4", 0, 3.5])
    library.make(tmp_path / "fresh", films, retriever)
    library.assert_same(after, library.content(tmp_path / "fresh"))


def test_unreadable_files_are_listed_and_left_alone(films, tmp_path, retriever, monkeypatch):
    index = tmp_path / "index"
    (films / "bad.mp4").write_bytes(b"not a video")
    videos.write_audio(films / "sound.mp4")
    (films / "empty.avi").touch()
    # Playlists name other files to read, whatever their own name.
    (films / "concat.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (films / "hls.TS").write_text("#EXTM3U\n#EXTINF:3,\na.mp4\n#EXT-X-ENDLIST\n\0")
    (films / "notes.txt").write_text("neither a video nor named as one")
    report = library.make(index, films, retriever)
    assert (report.added, report.failed) == (4, 5)
    reasons = dict(Index(index).failures())
    assert reasons["sound.mp4"] == "no video stream" and reasons["empty.avi"] == "zero bytes"
    for name in ("bad.mp4", "concat.mp4", "hls.TS"):
        assert "not readable as video" in reasons[name]
    with monkeypatch.context() as patch:
        patch.setattr(updater.Updater, "_decode", None)
        assert library.make(index, films, retriever).unchanged == 9
    library.write_film(films / "bad.mp4", 25)
    report = library.make(index, films, retriever, options={"retry": True})
    assert (report.changed, report.failed, report.unchanged) == (1, 4, 4)
    assert Index(index).counts() == {"files": 5, "moments": 5, "captions": 0, "failed": 4}


def test_a_bad_file_costs_only_itself(films, tmp_path, retriever, monkeypatch):
    """Files crash their decoder, take all memory, change or disappear between their digest and
    their decoding. What is indexed of the last two kinds stays, and the report says so."""
    for name in ("growing.mp4", "vanishing.mp4"):
        shutil.copy(films / "a.mp4", films / name)
    library.make(tmp_path / "index", films, retriever)
    before = library.content(tmp_path / "index")
    for name in ("crash", "endless", "rotate", "growing", "vanishing"):
        content = (films / "a.mp4").read_bytes() + name.encode()
        (films / f"{name}.mp4").write_bytes(content)
    monkeypatch.setattr(decoder, "plan_file", treacherous.plan)
    monkeypatch.setattr(decoder, "decode_job", treacherous.decode)
    report = library.make(tmp_path / "index", films, retriever, processes=True)
    assert (report.added, report.failed, report.unchanged, report.removed) == (0, 2, 4, 0)
    reasons = dict(Index(tmp_path / "index").failures())
    assert reasons.pop("crash.mp4") == "its decoder crashed (SIGSEGV)"
    assert "MemoryError" in reasons.pop("endless.mp4") and not reasons
    assert report.skipped == dict.fromkeys(
        ("rotate.mp4", "growing.mp4", "vanishing.mp4"), "it changes while it is read"
    )
    assert library.content(tmp_path / "index").keys() == before.keys()
    text = format_report(Index(tmp_path / "index"), report)
    assert "not read: 3, first " in text and "their indexed moments stay" in text


def test_parts_and_batches_do_not_matter(shared, tmp_path, retriever, monkeypatch):
    folder, index = shared
    monkeypatch.setattr(moments, "MAX_PICTURES", 6)  # as if every file were long
    monkeypatch.setattr(updater, "AHEAD", 0)
    options = {"workers": 2, "batch": 1}
    library.make(tmp_path / "parts", folder, retriever, options=options, window=1.0)
    library.assert_same(library.content(tmp_path / "parts"), library.content(index))


def test_files_with_damaged_vectors_are_embedded_again(copied, retriever, caplog):
    films, index = copied
    before = library.content(index)
    (heap,) = index.glob("*-moments-*.f32")
    heap.write_bytes(bytes(heap.stat().st_size))
    with pytest.raises(UserError, match="to rebuild the lost vectors"):
        vop_jax.search.open(index, retriever=retriever)
    report = library.make(index, films, retriever)
    assert (report.added, report.unchanged) == (4, 0)
    assert "27 vectors of moments are lost; their files are indexed again" in caplog.text
    library.assert_same(library.content(index), before)


def test_captions_are_those_of_the_file(copied, tmp_path, retriever, no_decoding):
    films, index = copied
    texts = tmp_path / "captions.txt"
    texts.write_text("one text\n\nanother text\none text\n")
    assert library.make(index, films, retriever, texts).captions == 2
    texts.write_text("another text\na third " + "word " * 100 + "\n")
    report = library.make(index, films, retriever, texts)
    assert (report.captions, report.truncated) == (1, 1)
    assert library.make(index, films, retriever).captions == 0  # without a file: unchanged
    rows = Index(index).search(retriever.embed_text(["another text"]), 5, to="captions")[0]
    assert rows[0].caption == "another text" and rows[0].score == pytest.approx(1, abs=1e-5)
    assert len(rows) == 2 and rows[0].file_id == 0 and rows[0].path == ""


def test_one_writer_at_a_time(shared, tmp_path, retriever):
    with locked(tmp_path / "index"), pytest.raises(UserError, match="another process is writing"):
        library.make(tmp_path / "index", shared[0], retriever)
    assert not (tmp_path / "index").exists()


def set_info(index, **fields):
    info = dataclasses.replace(Index(index).info, **fields)
    CatalogWriter(index, info).close()


def test_the_folder_may_move(copied, films, tmp_path, retriever, no_decoding):
    folder, index = copied
    with pytest.raises(UserError, match=r"indexes the folder .*films, not .*films; give another"):
        library.make(index, films, retriever)
    set_info(index, folder="/gone")
    library.write_films(tmp_path / "others", 1, seconds=2)
    with pytest.raises(UserError, match="has none of its files"):
        library.make(index, tmp_path / "others", retriever)
    assert library.make(index, folder, retriever).unchanged == 4
    assert Index(index).info.folder == str(folder)


def test_an_index_cannot_become_another(copied, retriever, no_decoding):
    films, index = copied
    assert library.make(index, films, None).unchanged == 4  # the stored model and its 3 frames
    assert library.make(index, films, retriever, window=1.0, stride=0.5).unchanged == 4
    for fields, message in (
        ({"window": 3.0}, r"--window=1, not 3; give another --index"),
        ({"stride": 1.0}, r"--stride=0.5, not 1"),
        ({"store": "http://localhost:1"}, r"keeps its vectors in its own folder, not in http"),
    ):
        with pytest.raises(UserError, match=message):
            library.make(index, films, retriever, **fields)
    for fields, message in (
        ({"frames": 4}, "no prompts and 4 frames a clip, not with no prompts and 3 frames"),
        (
            {"clip_fingerprint": "x", "clip_name": "other"},
            r"made with the CLIP other, not .* seed 0",
        ),
    ):
        set_info(index, **fields)
        with pytest.raises(UserError, match=message):
            library.make(index, films, retriever)
        with pytest.raises(UserError, match=message):
            vop_jax.search.open(index, retriever=retriever)


def test_paths_that_are_valid_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("gs://bucket/clip.safetensors") == "gs://bucket/clip.safetensors"
    assert absolute("milvus-lite:a") == f"milvus-lite:{tmp_path}/a"


def test_an_index_keeps_the_dtype_it_was_made_with(tmp_path, clip, shared):
    library.write_films(tmp_path / "films", count=1)
    index, folder = tmp_path / "index", str(tmp_path / "films")
    build_index(index, IndexRequest(folder, clip=str(clip), dtype="bfloat16"))
    assert open_searcher(index).retriever.dtype == "bfloat16"
    library.write_film(tmp_path / "films/new.mp4", 20)
    assert build_index(index, IndexRequest(dtype="auto")).added == 1
    assert Index(index).info.dtype == "bfloat16"
    with pytest.raises(UserError, match=r"was made with --dtype=bfloat16, not float32; give ano"):
        build_index(index, IndexRequest(dtype="float32"))
    # One that was made before the dtype was kept is in float32.
    directory = library.copy(shared[1], tmp_path / "old")
    statement = "UPDATE about SET value = json_remove(value, '$.dtype') WHERE key = 'info'"
    with contextlib.closing(sqlite3.connect(directory / catalog.FILE)) as db, db:
        assert db.execute(statement).rowcount == 1
        db.execute("PRAGMA application_id = 0")  # the checksum of the whole
    assert open_searcher(directory).retriever.dtype == "float32"
