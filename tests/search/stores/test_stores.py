"""Every store: vectors that were added are found again, exactly, whatever happens in between."""

import contextlib
import pathlib
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import processes
from tests.search import library
from tests.search.shelf import Shelf
from vop_jax.errors import UserError
from vop_jax.search import catalog
from vop_jax.search.index import Index
from vop_jax.search.stores import heap
from vop_jax.search.stores.base import named_ids
from vop_jax.search.stores.heap import open_store

E = 8
ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def shelf(uri, tmp_path):
    with contextlib.closing(Shelf(tmp_path / "index", E, uri)) as shelf:
        yield shelf


def drawn(count, seed=0, width=E):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def brute_force(vectors, queries, k, allowed=None):
    """What a search of {id: vector} finds: scores in float64, ties by id."""
    content = dict(enumerate(vectors)) if isinstance(vectors, np.ndarray) else vectors
    ids = sorted(id for id in content if allowed is None or id in allowed)
    best = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf)
    if ids:
        similar = queries.astype(float) @ np.stack([content[id] for id in ids]).astype(float).T
        order = np.argsort(-similar.astype(np.float32), axis=1, kind="stable")[:, :k]
        best[:, : len(ids)] = np.array(ids)[order]
        scores[:, : len(ids)] = np.take_along_axis(similar, order, axis=1)
    return best, scores


def assert_finds(snapshot, vectors, queries, k, allowed=None):
    listed = None if allowed is None else np.array(allowed, np.int64)
    ids, scores = snapshot.search(queries, k, listed)
    expected, best = brute_force(vectors, queries, k, allowed)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    assert ids.shape == scores.shape == (len(queries), k)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, best, atol=1e-5)


def test_search_equals_brute_force(shelf):
    """In an empty store, after one and several transactions, compacted and reopened."""
    queries = drawn(5, seed=3)
    assert_finds(shelf.vectors, {}, queries, 3)
    vectors = drawn(300)
    assert shelf.add(vectors[:1]) + shelf.add(vectors[1:]) == list(range(300))
    for k in (1, 10, 250, 310):
        assert_finds(shelf.vectors, vectors, queries, k)
    for allowed in ([], [5], [299, 3, 3, 5000], range(0, 300, 2), range(400)):
        assert_finds(shelf.vectors, vectors, queries, 4, allowed)
    np.testing.assert_array_equal(shelf.vectors.get([3, 299, 3]), vectors[[3, 299, 3]])
    with pytest.raises(UserError, match="has no id 300"):
        shelf.vectors.get([0, 300])
    assert shelf.vectors.search(np.empty((0, E), np.float32), 3)[0].shape == (0, 3)
    shelf.remove(range(100, 300))
    shelf.catalog.compact()
    assert_finds(shelf.vectors, vectors, queries, 7, shelf.ids.tolist())
    shelf.close()
    with contextlib.closing(Shelf(shelf.directory, E, shelf.info.store, files=300)) as again:
        assert again.ids.tolist() == list(range(100))
        assert again.add(drawn(1, seed=1)) == [300]  # no id is given twice
        np.testing.assert_array_equal(again.vectors.get([300, 5]), [drawn(1, 1)[0], vectors[5]])


def test_a_failed_transaction_and_bad_vectors_add_nothing(shelf):
    shelf.add(drawn(3))

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.add(drawn(2, seed=1), also=fail)
    for vectors, message in (
        (drawn(1, width=E + 1), r"vectors: shape \[1, 9\]; must be \[N, 8\]"),
        (np.full((2, E), [[1.0], [np.inf]]), "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            shelf.add(vectors)
    assert shelf.ids.tolist() == [0, 1, 2]
    ids = shelf.add(drawn(2, seed=2))
    np.testing.assert_array_equal(shelf.vectors.get(ids), drawn(2, seed=2))


numbers = st.integers(-4, 4).map(float)
vector = st.lists(numbers, min_size=3, max_size=3)
change = st.one_of(
    st.tuples(st.just("add"), st.lists(vector, min_size=1, max_size=6)),
    st.tuples(st.just("remove"), st.lists(st.integers(0, 12), max_size=4)),
    st.tuples(st.sampled_from(["reopen", "compact"]), st.none()),
)


@given(
    changes=st.lists(change, max_size=12),
    query=vector,
    k=st.integers(1, 15),
    allowed=st.none() | st.sets(st.integers(0, 14)),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_history(tmp_path_factory, monkeypatch, changes, query, k, allowed):
    """Small whole numbers, so that ties are many and exact; blocks of two rows."""
    monkeypatch.setattr(heap, "SLACK", 0)
    monkeypatch.setattr(heap, "BLOCK", 2)
    monkeypatch.setattr("os.fsync", lambda _: None)
    directory = tmp_path_factory.mktemp("history")
    shelf, expected = Shelf(directory, 3), {}  # {path: vector}
    for kind, value in changes:
        if kind == "add":
            expected |= {f"{i}.mp4": row for i, row in enumerate(value, shelf.files)}
            shelf.add(np.array(value, np.float32))
        elif kind == "remove":
            statement = "SELECT m.id, path FROM moments m JOIN files ON file = files.id"
            paths = dict(shelf.db.execute(statement))
            shelf.remove(value)
            for number in value:
                expected.pop(paths.get(number), None)
        elif kind == "compact":
            shelf.catalog.compact()
        else:
            shelf.close()
            shelf = Shelf(directory, 3, files=shelf.files)
    content = library.content(directory)
    assert {path: vector.tolist() for (path, _, _), vector in content.items()} == expected
    ids = shelf.ids
    content = dict(zip(ids.tolist(), shelf.vectors.get(ids), strict=True))
    listed = [id for id in ids.tolist() if allowed is None or id in allowed]
    assert_finds(shelf.vectors, content, np.array([query], np.float32), k, listed)
    shelf.close()


# Adds, removes and compacts; prints the number of each change once it is committed.
WRITER = """
import sys
import numpy as np
from tests.search.shelf import Shelf
from vop_jax.search.stores import heap
heap.SLACK = 16
shelf = Shelf(sys.argv[1], 8, sys.argv[2])
for step in range(10_000):
    if step % 5 == 4:
        shelf.remove(shelf.ids[::2])
    elif step % 10 == 7:
        shelf.catalog.compact()
    else:
        shelf.add(np.full((20, 8), step, np.float32))
    print(step, flush=True)
"""


def after(steps):
    """What WRITER leaves after some changes: the numbers in the vectors, in their order."""
    content = []
    for step in range(steps):
        if step % 5 == 4:
            content = content[1::2]
        elif step % 10 != 7:
            content += [step] * 20
    return content


def test_a_killed_writer(uri, tmp_path):
    """Killed at a random moment of a change: all of the change is there or nothing."""
    committed = 2 if uri else random.randrange(2, 60)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "index"), uri]
    writer = processes.Process(command, cwd=ROOT)
    for line in writer.stdout:
        if int(line) == committed:
            break
    time.sleep(random.random() / 50)
    writer.send_signal(signal.SIGKILL)
    last = int((line + writer.stdout.read()).split()[-1])
    for directory in (library.copy(tmp_path / "index", tmp_path / "copy"), tmp_path / "index"):
        with catalog.reading(directory) as db:
            store = open_store(directory, catalog.read_info(db), "moments", write=False)
            vectors = store.snapshot(db).get(named_ids(db, "moments"))
            store.close()
        assert vectors[:, 0].astype(int).tolist() in (after(last + 1), after(last + 2))
    shelf = Shelf(tmp_path / "index", E, uri, files=10**4)
    ids = shelf.add(drawn(1))
    np.testing.assert_array_equal(shelf.vectors.get(ids), drawn(1))
    shelf.catalog.compact()
    assert len(shelf.vectors) <= 2 * len(shelf.ids) + 1024
    shelf.close()
    assert uri or len(list((tmp_path / "index").iterdir())) <= 3  # no heap is left over


def test_searches_see_whole_states_while_one_writes(tmp_path, monkeypatch):
    """Files come and go by threes, and half of the time all rows are copied."""
    monkeypatch.setattr(heap, "SLACK", 0)
    shelf = Shelf(tmp_path, E)
    shelf.add(drawn(3))
    index = Index(tmp_path)

    def search(_):
        return {hit.path: hit.score for hit in index.search(drawn(1), 1000)[0]}

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(search, range(60))
        for seed in range(10):
            shelf.add(drawn(3, seed=seed + 1))
            if seed % 2:
                shelf.remove(shelf.ids[:3])
                shelf.catalog.compact()
        answers = list(answers)
    shelf.close()
    right = {}
    for seed in range(11):
        scores = (drawn(3, seed) @ drawn(1)[0]).tolist()
        right |= {f"{3 * seed + i}.mp4": score for i, score in enumerate(scores)}
    for scores in answers:
        assert len(scores) % 3 == 0
        assert scores == pytest.approx({path: right[path] for path in scores}, abs=1e-5)
