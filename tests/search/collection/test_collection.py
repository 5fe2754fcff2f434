"""An index on a Milvus server answers as one in a folder, whatever stops its writers."""

import os
import shutil
import threading
import uuid

import numpy as np
import pytest

from tests.search import library
from tests.search.library import write_film
from vop_jax import UserError
from vop_jax.search import __main__ as search
from vop_jax.search.build import IndexRequest
from vop_jax.search.collection import lease
from vop_jax.search.collection.build import build_collection
from vop_jax.search.collection.index import CollectionIndex
from vop_jax.search.collection.schema import (
    ABOUT,
    EXACT,
    FILES,
    MOMENTS,
    Collections,
    file_id,
    quote,
)
from vop_jax.search.searcher import Searcher, open_index, open_searcher

pytestmark = pytest.mark.slow


@pytest.fixture
def uri(milvus):
    return f"{milvus}#c{uuid.uuid4().hex[:12]}"


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    library.write_films(folder, 6)
    (folder / "o'd \\d").mkdir()
    write_film(folder / "o'd \\d" / 'q"ü.mp4', 12)
    return folder


def rows(uri):
    """All moments and files of an index, without their vectors."""
    collections = Collections(uri)
    return [
        sorted(collections.rows(ending), key=lambda row: row["id"]) for ending in (MOMENTS, FILES)
    ]


def answers(index, vectors, **options):
    hits = index.search(vectors, 5, **options)
    return [[(hit.path, hit.start, hit.end) for hit in row] for row in hits]


def test_it_answers_as_an_index_in_a_folder(uri, films, tmp_path, retriever):
    fields = {"window": 1.0}
    report = library.make(None, films, retriever, store=uri, **fields)
    assert report == library.make(tmp_path / "local", films, retriever, **fields)
    one, other = open_index(uri), open_index(tmp_path / "local")
    assert isinstance(one, CollectionIndex)
    assert one.counts() == other.counts()
    queries = np.random.default_rng(0).normal(size=(4, retriever.embed_dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for options in (
        {},
        {"per_file": False},
        {"folder": "sub", "until": "2023-11-16"},
        {"since": "2023-11-16"},
        {"folder": "o'd \\d"},
        {"folder": "nowhere"},
        {"min_score": 0.1},
    ):
        assert answers(one, queries, **options) == answers(other, queries, **options)
    scores = [[hit.score for hit in index.search(queries, 3)[0]] for index in (one, other)]
    np.testing.assert_allclose(*scores, atol=1e-5)

    for order in ("newest", "folder"):
        for options in ({}, {"folder": "sub"}):
            lists = [index.list_files(order, 1, 3, **options) for index in (one, other)]
            (total, files), (other_total, other_files) = lists
            assert total == other_total
            named = [(f.path, f.modified, f.end, f.moments) for f in files]
            assert named == [(f.path, f.modified, f.end, f.moments) for f in other_files]
    assert one.list_folders("", 9) == other.list_folders("", 9)
    assert one.list_folders("su", 9) == ["sub"]
    own, local = file_id("a.mp4"), other.search(queries, 1)[0][0].file_id
    assert one.neighbours(own, 0.5, 1.5).previous == (0.0, 1.0)
    assert one.neighbours(own, 0.0, 3.0) == other.neighbours(
        next(f.id for f in other.list_files("folder", 0, 9)[1] if f.path == "a.mp4"), 0.0, 3.0
    )
    assert one.modified([own])[1] == {own: os.stat(films / "a.mp4").st_mtime}
    assert one.path_of(own) == films / "a.mp4"
    assert local
    for call in (lambda: one.file_of(5), lambda: one.neighbours(own, 0.0, 9.0)):
        with pytest.raises(UserError, match="file"):
            call()
    for wrong in ({"to": "captions"}, {"by_frames": True}):
        with pytest.raises(UserError, match="an index on a server holds no"):
            one.search(queries, 3, **wrong)


def test_it_follows_its_folder(uri, films, tmp_path, retriever):
    fields = {"window": 1.0}
    library.make(None, films, retriever, store=uri, **fields)
    (films / "c.mp4").rename(films / "sub" / "moved.mp4")
    (films / "e.mp4").unlink()
    shutil.copy(films / "a.mp4", films / "copy.mp4")
    write_film(films / "sub" / "b.mp4", 17)
    (films / "junk.mp4").write_bytes(b"junk")
    report = library.make(None, films, retriever, store=uri)
    numbers = (report.added, report.changed, report.moved, report.removed, report.failed)
    assert numbers == (1, 1, 1, 1, 1)
    index = open_index(uri)
    assert [path for path, _ in index.failures()] == ["junk.mp4"]
    other = f"{uri}other"
    library.make(None, films, retriever, store=other, **fields)
    assert rows(uri) == rows(other)
    again = library.make(None, films, retriever, store=uri)
    assert (again.unchanged, again.added, again.failed) == (8, 0, 0)


def test_files_that_change_places_are_embedded_again(uri, films, retriever):
    library.make(None, films, retriever, store=uri, window=1.0)
    (films / "a.mp4").rename(films / "x")
    (films / "c.mp4").rename(films / "a.mp4")
    (films / "x").rename(films / "c.mp4")
    # Under another address of the same machine.
    report = library.make(None, films, retriever, store=uri.replace("127.0.0.1", "localhost"))
    assert (report.changed, report.unchanged) == (2, 5)
    other = f"{uri}other"
    library.make(None, films, retriever, store=other, window=1.0)
    assert rows(uri) == rows(other)


class Killed(BaseException):
    """As a process ends that is killed: nothing after it runs, not even the end of the lease."""


@pytest.mark.parametrize("step", [1, 2])
def test_a_killed_run_ends_as_one_that_was_not(uri, films, retriever, monkeypatch, step):
    """Between the messages of a run, which each are whole."""
    monkeypatch.setattr(lease, "PATIENCE", 0.5)
    monkeypatch.setattr(lease, "RENEWAL", 0.2)
    library.make(None, films, retriever, store=uri, window=1.0)
    write_film(films / "sub" / "b.mp4", 17)
    write_film(films / "new.mp4", 15)
    (films / "a.mp4").unlink()
    seen = []

    def until(name):
        whole = getattr(Collections, name)

        def call(self, ending, *args):
            if ending != ABOUT:
                if len(seen) == step:
                    raise Killed
                seen.append(ending)
            return whole(self, ending, *args)

        return call

    with monkeypatch.context() as patch:
        for name in ("upsert", "delete"):
            patch.setattr(Collections, name, until(name))
        patch.setattr(lease.Lease, "release", lambda self: self._ended.set())
        with pytest.raises(Killed):
            library.make(None, films, retriever, store=uri)
    library.make(None, films, retriever, store=uri)
    other = f"{uri}other"
    library.make(None, films, retriever, store=other, window=1.0)
    assert rows(uri) == rows(other)


def test_one_run_at_a_time(uri, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE", 1.5)
    monkeypatch.setattr(lease, "RENEWAL", 0.3)
    collections = Collections(uri)
    collections.create(8, EXACT)
    with lease.held(collections) as held:
        with pytest.raises(UserError, match="another run is writing it"), lease.held(collections):
            pass
        held.check()
        # One that stood still for so long that another one took its lease.
        while held._thread.is_alive():
            collections.write(lease.KEY, '{"owner": "other", "count": 1, "where": "elsewhere"}')
            held._thread.join(0.1)
        with pytest.raises(UserError, match="elsewhere"):
            held.check()
    refused = []

    def take():
        try:
            with lease.held(collections):
                threading.Event().wait(2)
        except UserError as error:
            refused.append(str(error))

    both = [threading.Thread(target=take) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(refused) <= 1  # the killed "other" is waited for, and then one of them writes


def test_what_is_not_its_own_is_refused(uri, films, retriever, clip, monkeypatch):
    with pytest.raises(UserError, match="no index there"):
        open_index(uri)
    library.make(None, films, retriever, store=uri)
    other = retriever.with_prompts(None, frames=2)
    with pytest.raises(UserError, match="was made with"):
        library.make(None, films, other, store=uri)
    with pytest.raises(UserError, match="was made with"):
        Searcher(open_index(uri), other)
    with pytest.raises(UserError, match="without --window"):
        library.make(None, films, retriever, store=uri, window=1.0)
    for field in ({"captions": "texts.txt"}, {"keep_frames": True}):
        with pytest.raises(UserError, match="needs --index=DIR"):
            build_collection(IndexRequest(str(films), store=uri, **field), None, retriever)
    Collections(uri).write("version", "99")
    with pytest.raises(UserError, match="is of version 99"):
        open_index(uri)
    address, _, name = uri.partition("#")
    foreign = Collections(f"{address}#{name}x")
    foreign._create(MOMENTS, {"id": None}, 4, EXACT)
    with pytest.raises(UserError, match="not an index of this program"):
        open_index(foreign.uri)
    with pytest.raises(UserError, match=r"store http://127\.0\.0\.1:1: "):
        open_index("http://127.0.0.1:1")


def test_the_minimum_of_scores_is_that_of_a_folder(uri, tmp_path, retriever):
    films = tmp_path / "films"
    library.write_films(films, 4, seconds=8)
    fields = {"window": 0.5}
    library.make(None, films, retriever, store=uri, **fields)
    library.make(tmp_path / "local", films, retriever, **fields)
    one, other = open_index(uri).calibration(), open_index(tmp_path / "local").calibration()
    assert one is not None and other is not None
    assert one.limit == pytest.approx(other.limit, rel=1e-3)
    hits = [
        open_searcher(place, retriever=retriever).text("a dog")
        for place in (uri, tmp_path / "local")
    ]
    assert [hit.path for hit in hits[0]] == [hit.path for hit in hits[1]]


def test_texts_of_any_length_are_kept(uri):
    collections = Collections(uri)
    collections.create(8, EXACT)
    for text in ("", "a:b", "x" * 200_000, "short"):
        collections.write("key", text)
        assert collections.read("key") == text
    assert quote('a"\\b') == '"a\\"\\\\b"'


@pytest.mark.parametrize("kind", ["HNSW:M=8,efConstruction=64,ef=16", "IVF_FLAT:nlist=4,nprobe=4"])
def test_approximate_indexes_find_nearly_all(uri, tmp_path, retriever, kind, capsys):
    films = tmp_path / "films"
    library.write_films(films, 4, seconds=8)
    library.make(None, films, retriever, store=uri, window=0.5, vector_index=kind)
    assert open_index(uri).info.vector_index == kind
    assert search.main(["recall", f"--store={uri}", "-k", "5"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert float(first.split()[1].rstrip(",")) > 0.9 and "128 texts" in first and "ms" in second
    hits = open_searcher(uri, retriever=retriever).text("a dog", folder="sub", min_score=None)
    assert {hit.path for hit in hits} == {"sub/b.mp4", "sub/d.mp4"}
    changed = kind.replace("ef=16", "ef=32").replace("nprobe=4", "nprobe=2")
    library.make(None, films, retriever, store=uri, vector_index=changed)  # of the search only
    assert open_index(uri).info.vector_index == changed
    with pytest.raises(UserError, match="was made with --vector_index"):
        library.make(None, films, retriever, store=uri, vector_index="FLAT")


@pytest.mark.parametrize(
    "text, message",
    [
        ("HNSW:M", "'M' must be NAME=NUMBER"),
        ("hnsw", "must be KIND:NAME=NUMBER"),
        ("NOSUCH", "store .*: .*NOSUCH"),
    ],
)
def test_a_wrong_vector_index_is_one_line(uri, films, retriever, text, message):
    with pytest.raises(UserError, match=message) as error:
        library.make(None, films, retriever, store=uri, vector_index=text)
    assert len(str(error.value).splitlines()) == 1
