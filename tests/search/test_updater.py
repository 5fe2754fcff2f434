"""An index follows what becomes of its folder."""

import errno
import hashlib
import os
import shutil

import numpy as np
import pytest

import vop_jax.search
from tests.search import library, treacherous
from tests.video import videos
from vop_jax import UserError
from vop_jax.search import build, catalog, decoder, show, updater
from vop_jax.search.asked import Request, absolute
from vop_jax.search.build import make_index
from vop_jax.search.index import Index


@pytest.fixture
def films(tmp_path):
    library.write_films(tmp_path / "films")
    return tmp_path / "films"


def test_clips_and_moments_are_embedded_as_the_retriever_does(shared, retriever):
    folder, index = shared
    found = library.content(index)
    assert len({path for path, *_ in found}) == 4
    spans = sorted((start, end) for path, start, end in found if path == "sub/b.mp4")
    assert spans == [(0, 1), (0, 3.1), (0.5, 1.5), (1, 2), (1.5, 2.5), (2, 3), (2.1, 3.1)]
    for (path, start, end), vector in found.items():
        frames = np.stack(retriever.sample(folder / path, start, end).pixels)
        np.testing.assert_allclose(vector, retriever.embed_frames(frames[None])[0], atol=1e-5)
    whole = retriever.embed_videos([folder / "a.mp4"])[0]
    np.testing.assert_allclose(found["a.mp4", 0.0, 3.0], whole, atol=1e-5)


def no_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(decoder.Decoder, "decode", refuse)


def test_it_follows_its_folder(films, tmp_path, retriever, monkeypatch):
    index = tmp_path / "index"
    done = library.make(index, films, retriever)
    assert (done.added, done.unchanged) == (4, 0)
    before = library.content(index)

    with monkeypatch.context() as patch:
        no_decoding(patch)  # nor even opened
        assert library.make(index, films, retriever).unchanged == 4

    (films / "sub/deeper").mkdir()
    (films / "a.mp4").rename(films / "sub/deeper/renamed.mp4")
    (films / "sub/b.mp4").unlink()
    videos.write(films / "c.mp4", 45, rate=10, width=32, height=32)
    shutil.copy(films / "sub/d.mp4", films / "copy.mp4")
    videos.write(films / "new.mp4", 21, rate=10, width=32, height=32)
    embedded = []
    embed = type(retriever).embed_frames
    monkeypatch.setattr(
        type(retriever), "embed_frames", lambda self, x: embedded.append(len(x)) or embed(self, x)
    )
    done = library.make(index, films, retriever)
    assert (done.added, done.changed, done.moved, done.removed) == (2, 1, 1, 1)
    assert sum(embedded) == 2  # what is new and what has changed
    after = library.content(index)
    assert {path for path, *_ in after} == {
        *("sub/deeper/renamed.mp4", "c.mp4", "sub/d.mp4", "copy.mp4", "new.mp4")
    }
    np.testing.assert_array_equal(after["sub/deeper/renamed.mp4", 0, 3], before["a.mp4", 0, 3])
    np.testing.assert_array_equal(after["copy.mp4", 0, 3.3], before["sub/d.mp4", 0, 3.3])
    fresh = tmp_path / "fresh"
    library.make(fresh, films, retriever)
    library.assert_same(after, library.content(fresh))


def test_names_may_go_round(films, tmp_path, retriever):
    """Each file has another's name now: what was a vector of one must not go with another."""
    index = tmp_path / "index"
    library.make(index, films, retriever)
    (films / "a.mp4").rename(films / "x")
    (films / "c.mp4").rename(films / "a.mp4")
    (films / "sub/b.mp4").rename(films / "c.mp4")
    (films / "x").rename(films / "sub/b.mp4")
    (films / "sub/d.mp4").rename(films / "sub/e.mp4")
    library.make(index, films, retriever)
    library.make(tmp_path / "fresh", films, retriever)
    library.assert_same(library.content(index), library.content(tmp_path / "fresh"))


def test_a_touched_file_is_looked_at_and_kept(films, tmp_path, retriever):
    index = tmp_path / "index"
    library.make(index, films, retriever)
    before = library.content(index)
    os.utime(films / "a.mp4")
    done = library.make(index, films, retriever)
    assert (done.unchanged, done.changed, done.moved) == (4, 0, 0)
    assert library.content(index).keys() == before.keys()


def test_unreadable_files_are_listed_and_left_alone(films, tmp_path, retriever, monkeypatch):
    index = tmp_path / "index"
    (films / "bad.mp4").write_bytes(b"not a video")
    videos.write_audio(films / "sound.mp4")
    (films / "empty.avi").touch()
    # Playlists have other files read, whatever they are called.
    (films / "concat.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (films / "hls.TS").write_text("#EXTM3U\n#EXTINF:3,\na.mp4\n#EXT-X-ENDLIST\n\0")
    (films / "notes.txt").write_text("no video, and not named as one")
    (films / ".hidden.mp4").write_bytes(b"")
    done = library.make(index, films, retriever)
    assert (done.added, done.failed) == (4, 5)
    reasons = dict(Index.open(index).failures())
    assert reasons["sound.mp4"] == "no video stream" and reasons["empty.avi"] == "zero bytes"
    for name in ("bad.mp4", "concat.mp4", "hls.TS"):
        assert "not readable as video" in reasons[name]
    with monkeypatch.context() as patch:
        no_decoding(patch)
        assert library.make(index, films, retriever).failed == 0
    assert library.make(index, films, retriever, retry=True).failed == 5
    videos.write(films / "bad.mp4", 25, rate=10, width=32, height=32)
    assert library.make(index, films, retriever).changed == 1
    assert Index.open(index).counts() == {"files": 5, "moments": 5, "captions": 0, "failed": 4}


def test_files_that_go_wrong_cost_themselves(films, tmp_path, retriever, monkeypatch):
    """One crashes its decoder, one takes all memory, one is replaced (as logs are rotated) between
    the taking of its digest and its decoding, one always grows, one goes away with its drive."""
    for name in ("growing.mp4", "vanishing.mp4"):
        shutil.copy(films / "a.mp4", films / name)
    library.make(tmp_path / "index", films, retriever)
    before = library.content(tmp_path / "index")
    for name in ("crash", "endless", "rotate", "growing", "vanishing"):
        content = (films / "a.mp4").read_bytes() + name.encode()
        (films / f"{name}.mp4").write_bytes(content)
    monkeypatch.setattr(decoder, "_plan", treacherous.plan)
    monkeypatch.setattr(decoder, "_decode", treacherous.decode)
    done = library.make(tmp_path / "index", films, retriever)
    assert (done.added, done.failed, done.unchanged, done.changed, done.removed) == (1, 2, 4, 0, 0)
    reasons = dict(Index.open(tmp_path / "index").failures())
    assert reasons.pop("crash.mp4") == "its decoder crashed (SIGSEGV)"
    assert "MemoryError" in reasons.pop("endless.mp4") and not reasons
    # What is indexed of them stays, and the run says so.
    assert done.skipped.keys() == {"growing.mp4", "vanishing.mp4"}
    after = library.content(tmp_path / "index")
    assert after.keys() >= before.keys()
    said = show.done(str(tmp_path / "index"), done)
    assert "not read: 2, first " in said and "what is indexed of them stays" in said
    # Digest and vectors are of one content.
    (found,) = (vector for (path, *_), vector in after.items() if path == "rotate.mp4")
    right = retriever.embed_videos([films / "c.mp4"])[0]
    np.testing.assert_allclose(found, right, atol=1e-5)
    with catalog.reading(tmp_path / "index") as db:
        ((digest,),) = db.execute("SELECT digest FROM files WHERE path = 'rotate.mp4'")
    assert digest == hashlib.sha256((films / "rotate.mp4").read_bytes()).hexdigest()


def test_what_is_in_a_folder_that_cannot_be_listed_stays(films, tmp_path, retriever, monkeypatch):
    library.make(tmp_path / "index", films, retriever)
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (films / "a.mp4").unlink()
    done = library.make(tmp_path / "index", films, retriever)
    assert (done.removed, done.unchanged, done.unlisted) == (1, 1, {"sub": "Permission denied"})
    assert len(library.content(tmp_path / "index")) == 3
    said = show.done(str(tmp_path / "index"), done)
    assert "folder sub cannot be listed (Permission denied): what is indexed of it stays" in said


def test_long_files_come_in_parts(films, tmp_path, retriever, monkeypatch):
    from vop_jax.video import moments

    whole = tmp_path / "whole"
    library.make(whole, films, retriever, window=1.0)
    monkeypatch.setattr(moments, "MAX_PICTURES", 6)
    library.make(tmp_path / "parts", films, retriever, window=1.0)
    library.assert_same(library.content(tmp_path / "parts"), library.content(whole))


def test_files_whose_vectors_are_damaged_are_embedded_again(films, tmp_path, retriever, caplog):
    """They are new; also where the whole file of vectors is gone."""
    index = tmp_path / "index"
    library.make(index, films, retriever)
    before = library.content(index)
    for damage in (lambda path: path.write_bytes(bytes(path.stat().st_size)), os.unlink):
        (heap,) = index.glob("*-moments-*.f32")
        damage(heap)
        with pytest.raises(UserError, match="which makes the lost vectors anew"):
            vop_jax.search.open(index, retriever=retriever)
        done = library.make(index, films, retriever)
        assert (done.added, done.unchanged) == (4, 0)
        assert "4 vectors of moments are lost; they are made again" in caplog.text
        library.assert_same(library.content(index), before)


def test_a_write_that_fails_changes_nothing(films, tmp_path, retriever, monkeypatch):
    index = tmp_path / "index"
    library.make(index, films, retriever)
    before = library.content(index)
    videos.write(films / "new.mp4", 21, rate=10, width=32, height=32)
    (films / "a.mp4").rename(films / "moved.mp4")

    def full(*_):
        raise OSError(28, "No space left on device", "vectors")

    with monkeypatch.context() as patch:
        patch.setattr("vop_jax.search.stores.heap.Heap.append", full)
        with pytest.raises(OSError, match="No space"):
            library.make(index, films, retriever)
    found = {path for path, *_ in library.content(index)}
    assert found == ({path for path, *_ in before} - {"a.mp4"}) | {"moved.mp4"}
    done = library.make(index, films, retriever)
    assert (done.added, done.unchanged) == (1, 4)


def test_captions_are_those_of_the_file(films, tmp_path, retriever):
    index, texts = tmp_path / "index", tmp_path / "captions.txt"
    texts.write_text("one text\n\nanother text\none text\n")
    assert library.make(index, films, retriever, texts).captions == 2
    texts.write_text("another text\na third " + "word " * 100 + "\n")
    done = library.make(index, films, retriever, texts)
    assert (done.captions, done.cut) == (1, 1)
    assert library.make(index, films, retriever).captions == 0  # no file: as they are
    rows = Index.open(index).search(retriever.embed_text(["another text"]), 5, to="captions")[0]
    assert rows[0].caption == "another text" and rows[0].score == pytest.approx(1, abs=1e-5)
    assert len(rows) == 2 and rows[0].file_id == 0 and rows[0].path == ""


def test_two_writers(films, tmp_path, retriever, monkeypatch):
    """Already when the first looks for files: what the second adds later would be missing there."""
    real = build.find_videos

    def find_videos(*arguments):
        monkeypatch.setattr(build, "find_videos", real)
        with pytest.raises(UserError, match="another process is writing this index"):
            library.make(tmp_path / "index", films, retriever)
        return real(*arguments)

    monkeypatch.setattr(build, "find_videos", find_videos)
    assert library.make(tmp_path / "index", films, retriever).added == 4


def test_an_index_that_another_made_meanwhile(films, tmp_path, retriever, monkeypatch):
    """Looked at before it is locked, it is another once it is."""
    real = build.check_new

    def check_new(*arguments):
        real(*arguments)
        monkeypatch.setattr(build, "check_new", real)
        library.make(tmp_path / "index", films, retriever, window=1.0)

    monkeypatch.setattr(build, "check_new", check_new)
    with pytest.raises(UserError, match="another process made this index meanwhile; run it again"):
        library.make(tmp_path / "index", films, retriever)
    assert Index.open(tmp_path / "index").info.window == 1.0


def test_the_folder_may_move(films, tmp_path, retriever, monkeypatch):
    index = tmp_path / "index"
    library.make(index, films, retriever)
    other = library.copy(films, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is of the folder .*films, not of .*elsewhere"):
        library.make(index, other, retriever)
    shutil.rmtree(films)
    library.write_films(tmp_path / "others", 1, seconds=2)
    with pytest.raises(UserError, match="has none of its files"):
        library.make(index, tmp_path / "others", retriever)
    with monkeypatch.context() as patch:
        no_decoding(patch)
        assert library.make(index, other, retriever).unchanged == 4
    assert Index.open(index).info.folder == str(other)


def test_what_an_index_was_made_with_cannot_change(films, tmp_path, retriever, clip):
    import vop_jax
    from tests import runs

    index = tmp_path / "index"
    library.make(index, films, retriever, window=2.0)
    assert library.make(index, films, retriever).unchanged == 4  # not said: as it was
    assert library.make(index, films, retriever, window=2.0, stride=1.0).unchanged == 4
    for asked, message in (
        ({"window": 3.0}, r"--window=2, not 3; give another --index"),
        ({"stride": 2.0}, r"--stride=1, not 2"),
        ({"store": "http://localhost:1"}, r"has its vectors in its own folder, not in http"),
    ):
        with pytest.raises(UserError, match=message):
            library.make(index, films, retriever, **asked)
    runs.write_clip(tmp_path / "other.safetensors", seed=1)
    other = vop_jax.load(tmp_path / "other.safetensors", frames=3, devices=1)
    with pytest.raises(UserError, match=r"made with the CLIP .* seed 0 .*, not .* seed 1"):
        library.make(index, films, other)
    with pytest.raises(UserError, match="3 frames a clip, not with no prompts and 4 frames"):
        library.make(index, films, retriever.with_prompts(None, frames=4))


def test_what_cannot_be_indexed(films, tmp_path, retriever):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").touch()
    for directory, folder, asked, message in (
        ("index", "nothing", {}, "no videos in this folder"),
        ("index", "none", {}, "no such folder"),
        ("file", "films", {}, "a file; an index is a folder"),
        ("full", "films", {}, "holds letter.txt, but no index"),
        ("index", "films", {"stride": 1.0}, "give their --window too"),
        ("index", "films", {"window": 1.0, "stride": 2.0}, "at most --window=1"),
        ("index", "films", {"captions": tmp_path / "none.txt"}, "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            library.make(tmp_path / directory, tmp_path / folder, retriever, **asked)
    assert not (tmp_path / "index").exists()


def test_batches_do_not_matter(films, tmp_path, retriever, monkeypatch):
    library.make(tmp_path / "four", films, retriever, window=1.0)
    monkeypatch.setattr(updater, "AHEAD", 0)
    request = updater.Making(workers=2, batch=1)
    make_index(tmp_path / "one", Request(str(films), window=1.0), request, retriever)
    library.assert_same(library.content(tmp_path / "one"), library.content(tmp_path / "four"))


@pytest.mark.slow
def test_vectors_in_milvus_lite(films, tmp_path, retriever):
    """The same hits as of an exact store; what is removed there is removed here."""
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    (films / "bad.mp4").write_bytes(b"no video")
    queries = retriever.embed_text(["one query", "another"])
    for step in range(2):
        found = []
        for name, asked in (("exact", {}), ("lite", {"store": str(tmp_path / "vectors.db")})):
            library.make(tmp_path / name, films, retriever, window=1.0, **asked)
            index = Index.open(tmp_path / name)
            found.append(index.search(queries, 50, per_file=False))
            index.close()
        for one, other in zip(*found, strict=True):
            assert len(one) == (27, 21)[step]
            assert {(hit.path, hit.start) for hit in one} == {(h.path, h.start) for h in other}
            np.testing.assert_allclose([h.score for h in one], [h.score for h in other], atol=1e-5)
        (films / "a.mp4").unlink(missing_ok=True)


def test_a_database_that_is_down_binds_no_index(films, tmp_path, retriever):
    pytest.importorskip("pymilvus")
    with pytest.raises(UserError, match="http://localhost:1"):
        library.make(tmp_path / "index", films, retriever, store="http://localhost:1")
    assert library.make(tmp_path / "index", films, retriever).added == 4


def test_an_index_of_another_frame_count_is_updated(films, tmp_path, retriever, clip):
    """By the command line, which says nothing of frames."""
    library.make(tmp_path / "index", films, retriever, clip=str(clip))
    assert library.make(tmp_path / "index", films, None).unchanged == 4


def test_what_is_elsewhere_stays_elsewhere():
    assert absolute("gs://bucket/clip.safetensors") == "gs://bucket/clip.safetensors"


def test_what_nothing_comes_of_leaves_no_folder(films, tmp_path, retriever):
    with pytest.raises(UserError, match="must be a local folder"):
        library.make(tmp_path / "index", films, retriever, store="ftp://x")
    assert not (tmp_path / "index").exists()
