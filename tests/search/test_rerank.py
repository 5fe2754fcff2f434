"""An index that keeps the vectors of frames, and results that are ranked again by them."""

import contextlib
import os
import shutil

import numpy as np
import pytest

from tests.search import library
from vop_jax import UserError
from vop_jax.search import catalog
from vop_jax.search.__main__ import main
from vop_jax.search.index import Index
from vop_jax.search.stores import heap
from vop_jax.video.moments import read_segment


@pytest.fixture(scope="module")
def kept(tmp_path_factory, retriever, clip):
    """(folder, index that keeps frames); read only."""
    root = tmp_path_factory.mktemp("kept")
    library.write_films(root / "films", 3)
    fields = {"window": 1.0, "clip": str(clip), "keep_frames": True}
    library.make(root / "index", root / "films", retriever, **fields)
    return root / "films", root / "index"


def frames_of(directory):
    """{(path, start, end): (vectors [F, E], seconds [F])} of an index."""
    statement = (
        'SELECT path, start, "end", frames.id, seconds FROM frames '
        "JOIN moments ON moments.id = moment JOIN files ON files.id = file"
    )
    index = Index(directory)
    with catalog.reading(directory) as db:
        rows = list(db.execute(statement))
        store = heap.open_store(directory, index.info, "frames", write=False)
        vectors = store.snapshot(db).get(np.array([row[3] for row in rows], np.int64))
        assert db.execute("SELECT COUNT(*) FROM moments").fetchone()[0] == len(rows)
    vectors = vectors.reshape(len(rows), index.info.frames, -1)
    return {
        row[:3]: (own, np.frombuffer(row[4], "<f4")) for row, own in zip(rows, vectors, strict=True)
    }


def assert_same_frames(one, other):
    assert one.keys() == other.keys()
    for key, (vectors, seconds) in one.items():
        np.testing.assert_allclose(vectors, other[key][0], atol=2e-3)  # float16
        np.testing.assert_array_equal(seconds, other[key][1])


def test_frames_are_those_of_their_moments(kept, shared, retriever):
    films, index = kept
    for (path, *segment), (vectors, seconds) in frames_of(index).items():
        pixels, times = read_segment(films / path, retriever.frame_spec, *segment)
        exact = retriever.embed_each_frame(pixels[None])[0]
        np.testing.assert_allclose(vectors, exact, atol=1e-3)
        np.testing.assert_allclose(seconds, times, atol=1e-4)
    # The vectors of moments are the same as without frames.
    plain = library.content(shared[1])
    own = library.content(index)
    library.assert_same(own, {key: plain[key] for key in own})


def test_results_are_ranked_by_their_best_frame(kept, retriever):
    index, query = Index(kept[1]), retriever.embed_text(["a dog"])
    frames = frames_of(kept[1])
    hits = index.search(query, 5, by_frames=True, per_file=False)[0]
    plain = index.search(query, 100, per_file=False)[0]
    scores = {}
    for hit in plain:
        vectors, seconds = frames[hit.path, hit.start, hit.end]
        each = vectors @ query[0]
        assert hit.frame is None
        scores[hit.path, hit.start, hit.end] = (
            (hit.score + each.max()) / 2,
            seconds[each.argmax()],
        )
    for hit in hits:
        score, frame = scores.pop((hit.path, hit.start, hit.end))
        assert hit.score == pytest.approx(score, abs=1e-5) and hit.frame == pytest.approx(frame)
    assert hits == sorted(hits, key=lambda hit: -hit.score)
    assert max(score for score, _ in scores.values()) <= hits[-1].score + 1e-6
    assert index.search(query, 5, by_frames=True, folder="nowhere") == [[]]


def test_frames_follow_the_folder(kept, tmp_path, retriever):
    films, index = library.copy(kept[0], tmp_path / "films"), tmp_path / "index"
    library.make(index, films, retriever, window=1.0, keep_frames=True)
    (films / "a.mp4").rename(films / "moved.mp4")
    shutil.copy(films / "sub/b.mp4", films / "copy.mp4")
    library.write_film(films / "c.mp4", 17)
    os.utime(films / "sub/b.mp4")
    report = library.make(index, films, retriever)
    assert (report.moved, report.changed, report.added) == (1, 1, 1)
    library.make(tmp_path / "fresh", films, retriever, window=1.0, keep_frames=True)
    assert_same_frames(frames_of(index), frames_of(tmp_path / "fresh"))
    (films / "sub/b.mp4").unlink()
    assert library.make(index, films, retriever).removed == 1
    assert "sub/b.mp4" not in {path for path, *_ in frames_of(index)}


def test_damaged_frames_are_made_again(kept, tmp_path, retriever, monkeypatch):
    films, index = kept[0], library.copy(kept[1], tmp_path / "index")
    before = frames_of(index)
    (file,) = index.glob("*-frames-*.f16")
    file.write_bytes(bytes(file.stat().st_size))
    query = retriever.embed_text(["a dog"])
    assert Index(index).search(query, 5)
    with pytest.raises(UserError, match="to rebuild the lost vectors"):
        Index(index).search(query, 5, by_frames=True)
    assert library.make(index, films, retriever).added == 3
    assert_same_frames(frames_of(index), before)
    monkeypatch.setattr(heap, "SLACK", 0)  # the old rows are most of both heaps
    library.make(index, films, retriever)
    assert_same_frames(frames_of(index), before)


def test_what_has_no_frames_says_so(kept, shared, retriever, capsys):
    query = retriever.embed_text(["a dog"])
    with pytest.raises(UserError, match="was made without --keep_frames"):
        Index(shared[1]).search(query, 5, by_frames=True)
    with pytest.raises(UserError, match="captions have no frames"):
        Index(kept[1]).search(query, 5, to="captions", by_frames=True)
    with pytest.raises(UserError, match="was made without --keep_frames; give another --index"):
        library.make(shared[1], shared[0], retriever, keep_frames=True)
    assert main(["info", f"--index={kept[1]}"]) == 0
    assert "frames    kept, for query --by_frames" in capsys.readouterr().out
    with contextlib.chdir(kept[0]):
        assert main(["query", "a dog", f"--index={kept[1]}", "--by_frames", "-k=2"]) == 0
    assert capsys.readouterr().out.count(" (frame at ") == 2
