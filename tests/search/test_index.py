"""What a search finds, among what, while others write."""

import concurrent.futures
import datetime
import pathlib
import shutil
import sqlite3

import numpy as np
import pytest

import vop_jax.search
from tests.search import library
from tests.search.shelf import Shelf
from vop_jax import UserError
from vop_jax.search import query as queries
from vop_jax.search.catalog import reading
from vop_jax.search.index import Index
from vop_jax.search.stores import heap

DIM = 8
FOLDERS = ("", "cats/", "cats/black/", "cats2/", "dogs/")


def unit(count, seed=0, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def synthetic(directory, files=60, moments=7, seed=0, prompts="", dim=DIM):
    """An index of files that are not there: (vectors [files, moments, E], their paths)."""
    shelf = Shelf(directory, dim, prompts=prompts)
    vectors = unit(files * moments, seed, dim).reshape(files, moments, dim)
    paths = [f"{FOLDERS[i % len(FOLDERS)]}{i}.mp4" for i in range(files)]
    with shelf.catalog.transaction():
        spans = [(float(j), j + 2.0) for j in range(moments)]
        for i, path in enumerate(paths):
            ids = shelf.catalog.store_vectors("moments", vectors[i])
            mtime = (library.DATE + 86400 * i) * 10**9
            shelf.catalog.add(path, 1, mtime, f"{i}", spans, ids)
    shelf.close()
    return vectors, paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic") / "index"
    return (*synthetic(directory), Index.open(directory))


def brute(vectors, paths, query, allowed, per_file=True):
    """[(path, start, score)], best first."""
    scores = vectors @ query
    rows = [
        (paths[i], float(j), float(scores[i, j]))
        for i in range(len(paths))
        if allowed(i)
        for j in ([int(scores[i].argmax())] if per_file else range(vectors.shape[1]))
    ]
    return sorted(rows, key=lambda row: -row[2])


def assert_found(hits, rows):
    assert [(hit.path, hit.start) for hit in hits] == [row[:2] for row in rows]
    np.testing.assert_allclose([hit.score for hit in hits], [row[2] for row in rows], atol=1e-6)


def day(i):
    return datetime.datetime.fromtimestamp(library.DATE + 86400 * i)


FILTERS = {
    "all": ({}, lambda i, path: True),
    "folder": ({"folder": "cats"}, lambda i, path: path.startswith("cats/")),
    "deeper": ({"folder": "./cats/black/"}, lambda i, path: path.startswith("cats/black/")),
    "the whole": ({"folder": "."}, lambda i, path: True),
    "nowhere": ({"folder": "c"}, lambda i, path: False),
    "since": ({"since": day(40)}, lambda i, path: i >= 40),
    "until a day": ({"until": day(40).date().isoformat()}, lambda i, path: i <= 40),
    "both": (
        {"folder": "dogs", "since": day(10).timestamp(), "until": day(30)},
        lambda i, path: path.startswith("dogs/") and 10 <= i < 30,
    ),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("few", [0, 20_000])
@pytest.mark.parametrize("per_file", [True, False])
def test_it_finds_what_looking_at_all_finds(made, name, few, per_file, monkeypatch):
    """By ids where few pass the filter, and by filtering the nearest where many do."""
    monkeypatch.setattr(queries, "FEW", few)
    monkeypatch.setattr(queries, "FIRST", 3)
    monkeypatch.setattr(queries, "EACH", 1)
    vectors, paths, index = made
    asked, allowed = FILTERS[name]
    asking = unit(3, seed=1)
    for k in (1, 5, 1000):
        found = index.search(asking, k, per_file=per_file, **asked)
        for query, hits in zip(asking, found, strict=True):
            rows = brute(vectors, paths, query, lambda i: allowed(i, paths[i]), per_file)
            assert_found(hits, rows[:k])


@pytest.mark.parametrize("asked", [{}, {"folder": "cats"}])
def test_thousands_of_moments_of_one_file_hide_no_other(made, monkeypatch, asked):
    """As if a store found no more than ten at once."""
    for name, value in (("MOST", 10), ("FIRST", 3), ("EACH", 1), ("FEW", 0)):
        monkeypatch.setattr(queries, name, value)
    vectors, paths, index = made
    query = unit(1, seed=2)
    allowed = FILTERS["folder" if asked else "all"][1]
    rows = brute(vectors, paths, query[0], lambda i: allowed(i, paths[i]))
    assert_found(index.search(query, 9, **asked)[0], rows[:9])


def test_what_the_store_has_lost_ends_a_search(made, monkeypatch):
    """Vectors of all files but three are not there, and nine are asked for."""
    for name, value in (("MOST", 10), ("FIRST", 3), ("EACH", 1), ("FEW", 0)):
        monkeypatch.setattr(queries, name, value)
    vectors, paths, index = made
    with reading(index.directory) as db:
        whole = index._store("videos").snapshot(db)

    class Lossy:
        def snapshot(self, db):
            return self

        def __len__(self):
            return len(whole)

        def search(self, asked, k, allowed=None):
            kept = np.arange(3 * vectors.shape[1])
            return whole.search(
                asked, k, kept if allowed is None else np.intersect1d(kept, allowed)
            )

    lossy = Lossy()
    monkeypatch.setattr(index, "_store", lambda to: lossy)
    query = unit(1, seed=2)
    rows = brute(vectors[:3], paths[:3], query[0], lambda i: True)
    assert_found(index.search(query, 9)[0], rows)


def test_an_index_that_was_made_anew_under_an_open_one(tmp_path):
    """Of as many vectors under the same names: what was read of the old is not mixed into it."""
    synthetic(tmp_path / "index", files=4, moments=2)
    index, query = Index.open(tmp_path / "index"), unit(1, seed=3)
    index.search(query, 4)
    shutil.rmtree(tmp_path / "index")
    vectors, paths = synthetic(tmp_path / "index", files=4, moments=2, seed=7)
    rows = brute(vectors, paths, query[0], lambda i: True)
    assert_found(index.search(query, 4)[0], rows)
    shutil.rmtree(tmp_path / "index")
    synthetic(tmp_path / "index", files=4, moments=2, prompts="other")
    with pytest.raises(UserError, match="was made anew, by another model; open it again"):
        index.search(query, 4)
    shutil.rmtree(tmp_path / "index")
    synthetic(tmp_path / "index", files=4, moments=2, dim=2 * DIM)
    with pytest.raises(UserError, match="was made anew, by another model; open it again"):
        index.search(query, 4)
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(UserError, match="no index; make one with"):
        index.search(query, 4)


def test_what_sqlite_cannot_read_or_write(tmp_path):
    from vop_jax.search.catalog import sqlite_errors

    locked = sqlite3.OperationalError("database is locked")
    locked.sqlite_errorcode = sqlite3.SQLITE_BUSY
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    for raised, message in (
        (error, "index: cannot be read or written .disk I/O error"),
        (sqlite3.OperationalError("Could not decode to UTF-8"), "damaged .* index the videos"),
        (locked, "index: another process keeps it locked"),
    ):
        with (
            pytest.raises(UserError, match=message),
            sqlite_errors(tmp_path / "index/catalog.sqlite"),
        ):
            raise raised


@pytest.mark.parametrize("name", ["旅行\u3000２", "a\u00a0b", "👨\u200d👩", "two words"])
def test_folders_of_any_name(tmp_path, name):
    shelf = Shelf(tmp_path / "index", DIM)
    shelf.add(unit(1))
    with shelf.catalog.transaction():
        shelf.catalog.move(shelf.catalog.files()["0.mp4"], f"{name}/0.mp4", 1, 1)
    shelf.close()
    assert len(Index.open(tmp_path / "index").search(unit(1), 9, folder=name)[0]) == 1


def test_what_the_catalog_does_not_know_is_not_found(tmp_path):
    vectors, paths = synthetic(tmp_path / "index", files=4, moments=2)
    shelf, query = Shelf(tmp_path / "index", DIM), unit(1, seed=3)
    shelf._made = 1000
    shelf.remove(shelf.add(np.repeat(query, 300, axis=0)))  # dead rows, and nearest of all
    shelf.close()
    hits = Index.open(tmp_path / "index").search(query, 3)[0]
    assert_found(hits, brute(vectors, paths, query[0], lambda i: True)[:3])


def test_filters_are_answered_by_sql_indexes(made):
    from vop_jax.search import catalog
    from vop_jax.search.query import make_filter

    index = made[2]
    with catalog.reading(index.directory) as db:
        for asked in ({"folder": "cats"}, {"since": "2026-01-01"}):
            where = make_filter(**asked)
            plan = db.execute(
                "EXPLAIN QUERY PLAN SELECT moments.id FROM moments JOIN files "
                f"ON files.id = moments.file WHERE 1 {where.sql}",
                where.values,
            ).fetchall()
            text = " ".join(row[-1] for row in plan)
            assert "SCAN" not in text and "SEARCH files USING" in text, text
            assert "SEARCH moments USING COVERING INDEX moments_file" in text, text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"k": 0}, "k=0: must be 1 to"),
        ({"to": "sounds"}, "to='sounds': allowed are videos, captions"),
        ({"folder": "/etc"}, "must be inside the indexed folder"),
        ({"folder": "cats/../../x"}, "must be inside the indexed folder"),
        ({"folder": "a\0b"}, "not a name of a folder"),
        ({"folder": "a\ud83d"}, "not a name of a folder"),
        ({"since": "yesterday"}, "since='yesterday': must be a date such as 2026-11-25"),
        ({"until": "2026-02-30"}, "until='2026-02-30': must be a date"),
    ],
)
def test_wrong_questions(made, asked, message):
    with pytest.raises(UserError, match=message):
        made[2].search(unit(1), asked.pop("k", 1), **asked)


def test_a_writer_beside_a_search(tmp_path, monkeypatch):
    """What it has not committed is not seen, and it commits when the search has ended."""
    shelf = Shelf(tmp_path / "index", DIM)
    shelf.add(unit(3))
    index, real, writer = Index.open(tmp_path / "index"), heap.Heap.snapshot, []
    index.open_vectors()

    def write():
        shelf.remove([0])
        shelf.catalog.compact()

    def slowly(self, db):
        extent = self._extent(db)
        writer.append(pool.submit(write))
        with pytest.raises(TimeoutError):
            writer[0].result(0.2)
        assert (tmp_path / "index" / extent.name).exists()
        return real(self, db)

    monkeypatch.setattr(heap, "SLACK", -2)
    shelf.db.close()
    shelf.db = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        shelf = pool.submit(Shelf, tmp_path / "index", DIM).result()
        with monkeypatch.context() as patch:
            patch.setattr(heap.Heap, "snapshot", slowly)
            assert len(index.search(unit(1), 9)[0]) == 3
        writer[0].result()
        assert len(index.search(unit(1), 9)[0]) == 2
        pool.submit(shelf.close).result()


def test_where_files_are(shared):
    folder, directory = shared
    index = Index.open(directory)
    hit = index.search(unit_of(index), 1)[0][0]
    assert index.path_of(hit.file_id) == pathlib.Path(folder, hit.path)
    with pytest.raises(UserError, match="file 99: not in the index"):
        index.path_of(99)


def unit_of(index):
    return np.eye(1, index.info.dim, dtype=np.float32)


def test_what_is_no_index(tmp_path, shared):
    with pytest.raises(UserError, match="no index; make one with"):
        Index.open(tmp_path)
    (tmp_path / "catalog.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(UserError, match=r"damaged \(file is not a database\); remove"):
        Index.open(tmp_path)
    newer = library.copy(shared[1], tmp_path / "newer")
    with sqlite3.connect(newer / "catalog.sqlite") as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(UserError, match=r"index of version 7, this program reads version 2; use"):
        Index.open(newer)


def test_the_searcher(shared, retriever, tmp_path):
    folder, directory = shared
    searcher = vop_jax.search.open(directory, retriever=retriever)
    for path in ("a.mp4", "sub/d.mp4"):
        hit = searcher.video(folder / path, k=4)[0]
        assert (hit.path, hit.start) == (path, 0.0) and hit.score == pytest.approx(1, abs=1e-5)
    captions = searcher.video(folder / "a.mp4", to="captions")
    assert {(hit.caption, hit.path) for hit in captions} == {
        ("grey becomes white", "a.mp4"),
        ("another film", "sub/b.mp4"),
    }
    assert searcher.index.path_of(captions[0].file_id).exists()
    query = "grey becomes white"
    hits = searcher.text(query, k=3, folder="sub", per_file=False)
    assert len(hits) == 3 and all(hit.path.startswith("sub/") for hit in hits)
    seconds, scores = searcher.explain(query, hits[0])
    assert len(seconds) == len(scores) == 3
    assert hits[0].start <= seconds[0] < seconds[-1] < hits[0].end
    vector = searcher.vector(query)
    frames = np.stack(retriever.sample(folder / hits[0].path, hits[0].start, hits[0].end).pixels)
    each = retriever.embed_each_frame(frames[None])[0]
    np.testing.assert_allclose(scores, each @ vector, atol=1e-5)
    with pytest.raises(UserError, match="the query is empty"):
        searcher.text("  ")
    (tmp_path / "text.png").write_text("no picture")
    for path, message in (("text.png", "not readable as a picture"), ("none.png", "no such file")):
        with pytest.raises(UserError, match=message):
            searcher.image(tmp_path / path)


def test_a_picture_finds_its_film(shared, retriever, tmp_path):
    from PIL import Image

    searcher = vop_jax.search.open(shared[1], retriever=retriever)
    frame = retriever.sample(shared[0] / "a.mp4", 1.0, 1.3).pixels[1]
    Image.fromarray(frame).save(tmp_path / "frame.png")
    hits = searcher.image(tmp_path / "frame.png", k=50, per_file=False)
    vector = retriever.embed_images([frame])[0]
    assert hits == searcher.nearest(vector, 50, per_file=False) and len(hits) == 27


def test_threads_share_a_searcher(shared, retriever):
    searcher = vop_jax.search.open(shared[1], retriever=retriever)
    texts = [f"query {i}" for i in range(12)]
    alone = [searcher.text(text, 3) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: searcher.text(text, 3), texts)) == alone


def test_an_index_and_its_model(shared, retriever, tmp_path):
    import vop_jax
    from tests import runs

    runs.write_clip(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UserError, match=r"made with .* seed 0 .*, not with .* seed 1"):
        vop_jax.search.open(
            shared[1], retriever=vop_jax.load(tmp_path / "other.safetensors", devices=1)
        )
    with pytest.raises(UserError, match="3 frames a clip, not with no prompts and 4 frames"):
        vop_jax.search.open(shared[1], retriever=retriever.with_prompts(None, frames=4))
    with pytest.raises(UserError, match=r"names no CLIP of its own; say --clip=FILE"):
        vop_jax.search.open(shared[1])
    with pytest.raises(UserError, match=r"gone since .* was made; say --clip=FILE"):
        vop_jax.search.open(shared[1], clip=tmp_path / "gone.safetensors")
