"""What a search finds, also while others write."""

import concurrent.futures
import datetime
import pathlib
import shutil
import sqlite3

import numpy as np
import pytest
from PIL import Image

import vop_jax.search
from tests.search import library
from tests.search.shelf import DATE, Shelf
from tests.search.test_updater import set_info
from vop_jax import UserError
from vop_jax.search import catalog, query
from vop_jax.search.index import Index
from vop_jax.search.scan import VideoFile
from vop_jax.search.stores import heap

DIM = 8
FOLDERS = ("", "cats/", "cats/black/", "cats2/", "dogs/")


def unit(count, seed=0, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def synthetic(directory, files=60, moments=7, seed=0, dim=DIM, **options):
    """Writes an index of files that do not exist: (vectors [files, moments, E], their paths)."""
    shelf = Shelf(directory, dim, folders=FOLDERS, **options)
    vectors = unit(files * moments, seed, dim).reshape(files, moments, dim)
    shelf.add(vectors)
    paths = [*shelf.catalog.files()]
    shelf.close()
    return vectors, paths


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic") / "index"
    return (*synthetic(directory), Index(directory))


def brute_force(vectors, paths, vector, passes, per_file=True):
    """[(path, start, score)], best first."""
    scores = vectors @ vector
    rows = [
        (paths[i], float(j), float(scores[i, j]))
        for i in range(len(paths))
        if passes(i)
        for j in ([int(scores[i].argmax())] if per_file else range(vectors.shape[1]))
    ]
    return sorted(rows, key=lambda row: -row[2])


def assert_hits(hits, rows):
    assert [(hit.path, hit.start) for hit in hits] == [row[:2] for row in rows]
    np.testing.assert_allclose([hit.score for hit in hits], [row[2] for row in rows], atol=1e-6)


def day(i):
    return datetime.datetime.fromtimestamp(DATE + 86400 * i)


FILTERS = {
    "none": ({}, lambda i, path: True),
    "folder": ({"folder": "cats"}, lambda i, path: path.startswith("cats/")),
    "subfolder": ({"folder": "./cats/black/"}, lambda i, path: path.startswith("cats/black/")),
    "root": ({"folder": "."}, lambda i, path: True),
    "prefix of a name": ({"folder": "c"}, lambda i, path: False),
    "since": ({"since": day(40)}, lambda i, path: i >= 40),
    "until a day": ({"until": day(40).date().isoformat()}, lambda i, path: i <= 40),
    "folder and dates": (
        {"folder": "dogs", "since": day(10).timestamp(), "until": day(30)},
        lambda i, path: path.startswith("dogs/") and 10 <= i < 30,
    ),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("per_file", [True, False])
def test_a_search_equals_brute_force(example, name, per_file, monkeypatch):
    """By ids where few rows pass the filter, and by filtering the nearest where many do.

    With few vectors at first, the moments of one file hide others until more are looked at.
    """
    vectors, paths, index = example
    options, passes = FILTERS[name]
    queries = unit(3, seed=1)
    for few, first in ((0, 3), (20_000, 3), (0, 64)):
        for constant, value in (("FEW", few), ("FIRST", first), ("EACH", 1)):
            monkeypatch.setattr(query, constant, value)
        for k in (1, 5, 1000):
            results = index.search(queries, k, per_file=per_file, **options)
            for vector, hits in zip(queries, results, strict=True):
                rows = brute_force(vectors, paths, vector, lambda i: passes(i, paths[i]), per_file)
                assert_hits(hits, rows[:k])


def test_an_index_made_anew_under_an_open_one(tmp_path):
    """With as many vectors under the same names: the old vectors are not mixed with them."""
    directory = tmp_path / "index"
    synthetic(directory, files=4, moments=2)
    index, vector = Index.open(directory), unit(1, seed=3)
    index.search(vector, 4)
    shutil.rmtree(directory)
    vectors, paths = synthetic(directory, files=4, moments=2, seed=7)
    rows = brute_force(vectors, paths, vector[0], lambda i: True)
    assert_hits(index.search(vector, 4)[0], rows)
    for changed in ({"prompts": "other"}, {"dim": 2 * DIM}):
        shutil.rmtree(directory)
        synthetic(directory, files=4, moments=2, **changed)
        with pytest.raises(UserError, match="was rebuilt with another model; open it again"):
            index.search(vector, 4)
    shutil.rmtree(directory)
    with pytest.raises(UserError, match="no index; make one with"):
        index.search(vector, 4)


def test_errors_of_sqlite(tmp_path):
    for text, code, message in (
        ("disk I/O error", sqlite3.SQLITE_IOERR_SHMSIZE, "cannot be read or written .disk I/O err"),
        ("Could not decode to UTF-8", 0, "damaged .* index the videos"),
        ("database is locked", sqlite3.SQLITE_BUSY, "cannot be read or written .database is lock"),
    ):
        error = sqlite3.OperationalError(text)
        error.sqlite_errorcode = code
        with pytest.raises(UserError, match=message), catalog.sqlite_errors(tmp_path / "index/x"):
            raise error


def test_folders_of_any_name_and_dead_vectors(tmp_path):
    """Rows that the catalog does not name are the nearest of all, and are no hits."""
    shelf, vector = Shelf(tmp_path / "index", DIM), unit(1)
    names = ["旅行\u3000２", "a\u00a0b", "👨\u200d👩", "two words"]
    shelf.add(unit(len(names), seed=1))
    shelf.remove(shelf.add(np.repeat(vector, 300, axis=0)))
    with shelf.catalog.transaction():
        for path, indexed in shelf.catalog.files().items():
            name = names[int(path.removesuffix(".mp4"))]
            shelf.catalog.move(indexed, VideoFile(f"{name}/{path}", 1, 1))
    shelf.close()
    index = Index(tmp_path / "index")
    for i, name in enumerate(names):
        (hit,) = index.search(vector, 9, folder=name)[0]
        assert hit.path == f"{name}/{i}.mp4"
    assert len(index.search(vector, 9)[0]) == 4


def test_filters_use_the_indexes_of_sqlite(example):
    with catalog.reading(example[2].directory) as db:
        for options in ({"folder": "cats"}, {"since": "2026-01-01"}):
            condition, values = query.make_filter(**options).sql()
            plan = db.execute(
                f"EXPLAIN QUERY PLAN SELECT moments.id FROM {query.SOURCES['videos']} "
                f"WHERE 1 {condition}",
                values,
            ).fetchall()
            text = " ".join(row[-1] for row in plan)
            assert "SCAN" not in text and "SEARCH files USING" in text, text
            assert "SEARCH moments USING COVERING INDEX moments_file" in text, text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: must be 1 to"),
        ({"vectors": unit(1)[0]}, r"vectors: shape \[8\]; must be \[N, 8\]"),
        ({"vectors": np.full((1, DIM), np.nan)}, "vectors: NaN or infinite values"),
        ({"to": "sounds"}, "to='sounds': allowed are videos, captions"),
        ({"folder": "/etc"}, "must be inside the indexed folder"),
        ({"folder": "cats/../../x"}, "must be inside the indexed folder"),
        ({"folder": "a\0b"}, "not a name of a folder"),
        ({"folder": "a\ud83d"}, "not a name of a folder"),
        ({"since": "yesterday"}, "since='yesterday': must be a date such as 2026-11-25"),
        ({"until": "2026-02-30"}, "until='2026-02-30': must be a date"),
    ],
)
def test_wrong_arguments(example, options, message):
    with pytest.raises(UserError, match=message):
        example[2].search(**{"vectors": unit(1), "k": 1, **options})


def test_a_commit_waits_for_a_search(tmp_path, monkeypatch):
    """A search does not see what is not committed; its heap stays until it ends."""
    shelf = Shelf(tmp_path / "index", DIM)
    shelf.add(unit(3))
    shelf.close()
    index, snapshot, writing = Index(tmp_path / "index"), heap.Heap.snapshot, []
    index.open_vectors()

    def write():
        shelf = Shelf(tmp_path / "index", DIM)
        shelf.remove([0])
        shelf.catalog.compact()
        shelf.close()

    def slow_snapshot(self, db):
        monkeypatch.setattr(heap.Heap, "snapshot", snapshot)
        extent = self._extent(db)
        writing.append(pool.submit(write))
        with pytest.raises(TimeoutError):
            writing[0].result(0.3)
        assert (tmp_path / "index" / extent.name).exists()
        return snapshot(self, db)

    monkeypatch.setattr(heap, "SLACK", -2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(heap.Heap, "snapshot", slow_snapshot)
        assert len(index.search(unit(1), 9)[0]) == 3
        writing[0].result()
    assert len(index.search(unit(1), 9)[0]) == 2


def test_what_is_no_index(tmp_path, example):
    with pytest.raises(UserError, match="no index; make one with"):
        Index(tmp_path)
    with pytest.raises(UserError, match="does not name its CLIP; give --clip=FILE"):
        vop_jax.search.open(example[2].directory)
    (tmp_path / catalog.FILE).write_bytes(b"something else" * 1000)
    with pytest.raises(UserError, match=r"damaged \(file is not a database\); remove"):
        Index(tmp_path)
    index = library.copy(example[2].directory, tmp_path / "index")
    set_info(index, clip="/c.safetensors", folder="/films")
    command = "index /films --clip=/c.safetensors --window=2.0 --stride=1.0"
    for version, advice in (
        (7, "use a newer program, or give another --index"),
        (1, f"remove it, then: python -m vop_jax.search {command} --index={index}"),
    ):
        with sqlite3.connect(index / catalog.FILE) as db:
            db.execute(f"PRAGMA user_version = {version}")
        db.close()
        message = f"{index}: an index of version {version}, this program reads version 2; {advice}"
        for open_it in (Index, catalog.stored_info):
            with pytest.raises(UserError) as error:
                open_it(index)
            assert str(error.value) == message


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
    index = searcher.index
    assert index.path_of(captions[0].file_id) == pathlib.Path(folder, captions[0].path)
    with pytest.raises(UserError, match="file 99: not in the index"):
        index.path_of(99)
    text = "grey becomes white"
    hits = searcher.text(text, k=3, folder="sub", per_file=False)
    assert len(hits) == 3 and all(hit.path.startswith("sub/") for hit in hits)
    seconds, scores = searcher.explain(text, hits[0])
    assert len(seconds) == len(scores) == 3
    assert hits[0].start <= seconds[0] < seconds[-1] < hits[0].end
    frames = np.stack(retriever.sample(folder / hits[0].path, hits[0].start, hits[0].end).pixels)
    each = retriever.embed_each_frame(frames[None])[0]
    np.testing.assert_allclose(scores, each @ searcher.vector(text), atol=1e-5)
    with pytest.raises(UserError, match="the query is empty"):
        searcher.text("  ")
    Image.fromarray(frames[1]).save(tmp_path / "frame.png")
    hits = searcher.image(tmp_path / "frame.png", k=50, per_file=False)
    vector = retriever.embed_images([frames[1]])[0]
    assert hits == searcher.nearest(vector, 50, per_file=False) and len(hits) == 27
    (tmp_path / "text.png").write_text("no picture")
    for path, message in (("text.png", "not readable as a picture"), ("none.png", "no such file")):
        with pytest.raises(UserError, match=message):
            searcher.image(tmp_path / path)
    texts = [f"query {i}" for i in range(12)]
    alone = [searcher.text(text, 3) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: searcher.text(text, 3), texts)) == alone
