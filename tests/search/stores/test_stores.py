"""Every store: what is added is found again, exactly, whatever happens in between."""

import contextlib
import pathlib
import random
import signal
import sys
import time

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
from vop_jax.search.stores.base import named_ids
from vop_jax.search.stores.open import open_store

E = 8
ROOT = pathlib.Path(__file__).parents[3]
KINDS = ("heap", "milvus")


@pytest.fixture(params=KINDS)
def uri(request, tmp_path):
    if request.param == "heap":
        return ""
    pytest.importorskip("pymilvus", reason="pip install '.[milvus]'")
    pytest.importorskip("milvus_lite", reason="pip install '.[milvus]'")
    return str(tmp_path / "store.db")


@pytest.fixture
def shelf(uri, tmp_path):
    with contextlib.closing(Shelf(tmp_path / "index", E, uri)) as made:
        yield made


def drawn(count, seed=0, width=E):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def brute_force(vectors, queries, k, allowed=None):
    """What a search must answer, of {id: vector}: scores in float64, ties by id."""
    content = dict(enumerate(vectors)) if isinstance(vectors, np.ndarray) else vectors
    ids = sorted(id for id in content if allowed is None or id in allowed)
    found = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf)
    if ids:
        similar = queries.astype(float) @ np.stack([content[id] for id in ids]).astype(float).T
        order = np.argsort(-similar.astype(np.float32), axis=1, kind="stable")[:, :k]
        found[:, : len(ids)] = np.array(ids)[order]
        scores[:, : len(ids)] = np.take_along_axis(similar, order, axis=1)
    return found, scores


def assert_finds(snapshot, vectors, queries, k, allowed=None):
    listed = None if allowed is None else np.array(allowed, np.int64)
    ids, scores = snapshot.search(queries, k, listed)
    expected, best = brute_force(vectors, queries, k, allowed)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    assert ids.shape == scores.shape == (len(queries), k)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, best, atol=1e-5)


def test_search_equals_brute_force(shelf):
    """Of nothing, of what one and several transactions added, and of what was compacted."""
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


def test_ties_go_to_the_smaller_id(shelf):
    # Whole numbers: no order of summing rounds them.
    same = np.tile(np.arange(E, dtype=np.float32), (400, 1))
    shelf.add(same)
    shelf.add(2 * same[:1])
    found, scores = shelf.vectors.search(same[:1], 6)
    assert found[0].tolist() == [400, 0, 1, 2, 3, 4]
    assert len(set(scores[0, 1:])) == 1
    assert shelf.vectors.search(same[:1], 2, np.arange(50, 90))[0][0].tolist() == [50, 51]


def test_reopened(shelf):
    shelf.add(drawn(20))
    shelf.remove([3])
    shelf.close()
    again = Shelf(shelf.directory, E, shelf.info.store)
    assert again.ids.tolist() == [i for i in range(20) if i != 3]
    assert again.add(drawn(1, seed=1)) == [20]  # not 3: no id is given twice
    np.testing.assert_array_equal(again.vectors.get([20, 5]), [drawn(1, 1)[0], drawn(20)[5]])
    again.close()


def test_a_transaction_that_fails_adds_nothing(shelf):
    shelf.add(drawn(3))

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.add(drawn(2, seed=1), also=fail)
    assert shelf.ids.tolist() == [0, 1, 2]
    ids = shelf.add(drawn(2, seed=2))
    np.testing.assert_array_equal(shelf.vectors.get(ids), drawn(2, seed=2))


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (drawn(1, width=E + 1), r"vectors: shape \[1, 9\]; must be \[N, 8\]"),
        (drawn(1)[0], r"vectors: shape \[8\]"),
        (np.full((1, E), np.nan), "NaN or infinite"),
        (np.full((2, E), [[1.0], [np.inf]]), "NaN or infinite"),
    ],
)
def test_bad_vectors_are_refused_and_nothing_changes(shelf, vectors, says):
    shelf.add(drawn(1))
    with pytest.raises(UserError, match=says):
        shelf.add(vectors)
    assert shelf.ids.tolist() == [0]
    np.testing.assert_array_equal(shelf.vectors.get([0]), drawn(1))


@pytest.mark.parametrize(
    ("queries", "k", "says"),
    [
        (drawn(1, width=3), 1, r"queries: shape \[1, 3\]"),
        (np.full((1, E), np.nan), 1, "queries: NaN"),
        (drawn(1), 0, "k=0: must be 1 or more"),
    ],
)
def test_bad_searches(tmp_path, queries, k, says):
    with contextlib.closing(Shelf(tmp_path, E)) as shelf:
        shelf.add(drawn(1))
        with pytest.raises(UserError, match=says):
            shelf.vectors.search(queries, k)


def test_a_name_that_is_no_store(tmp_path):
    with pytest.raises(UserError, match=r"store s3://bucket.*: .*FILE.db"):
        Shelf(tmp_path, E, "s3://bucket/store")


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
    monkeypatch.setattr("vop_jax.search.stores.heap.SLACK", 0)
    monkeypatch.setattr("vop_jax.search.stores.heap.BLOCK", 2)
    monkeypatch.setattr("os.fsync", lambda _: None)
    directory = tmp_path_factory.mktemp("history")
    shelf, files = Shelf(directory, 3), {}  # by path
    for what, value in changes:
        paths = {
            id: path
            for id, path in shelf.db.execute(
                "SELECT moments.id, path FROM moments JOIN files ON file = files.id"
            )
        }
        if what == "add":
            made = shelf._made
            shelf.add(np.array(value, np.float32))
            files |= {f"{made + i}.mp4": row for i, row in enumerate(value)}
        elif what == "remove":
            shelf.remove(value)
            for number in value:
                files.pop(paths.get(number), None)
        elif what == "compact":
            shelf.catalog.compact()
        else:
            made = shelf._made
            shelf.close()
            shelf = Shelf(directory, 3)
            shelf._made = made
    found = {path: vector.tolist() for (path, _, _), vector in library.content(directory).items()}
    assert found == files
    queries, ids = np.array([query], np.float32), shelf.ids
    content = dict(zip(ids.tolist(), shelf.vectors.get(ids), strict=True))
    listed = [id for id in ids.tolist() if allowed is None or id in allowed]
    found, scores = shelf.vectors.search(queries, k, np.array(listed, np.int64))
    expected, best = brute_force(content, queries, k, listed)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, best)
    shelf.close()


# Adds, removes and compacts; prints a number once the change of this number has returned.
WRITER = """
import sys
import numpy as np
from tests import processes
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
    """What WRITER leaves after so many changes: the numbers in the vectors, in their order."""
    content = []
    for step in range(steps):
        if step % 5 == 4:
            content = content[1::2]
        elif step % 10 != 7:
            content += [step] * 20
    return content


@pytest.mark.parametrize("acknowledged", [2, 100])
def test_killed_while_it_writes(uri, tmp_path, acknowledged):
    """And a moment after, so that nothing is known of where."""
    if uri and acknowledged != 2:
        pytest.skip("once is enough of a database's own care")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "index"), uri]
    writer = processes.Process(command, cwd=ROOT)
    for line in writer.stdout:
        if int(line) == acknowledged:
            break
    time.sleep(random.random() / 50)
    writer.send_signal(signal.SIGKILL)
    last = int((line + writer.stdout.read()).split()[-1])
    # The change that was under way is there as a whole or not at all; for a reader, too.
    for directory in (library.copy(tmp_path / "index", tmp_path / "copy"), tmp_path / "index"):
        info = catalog.stored_info(directory)
        with catalog.reading(directory) as db:
            store = open_store(directory, info, "moments", write=False)
            found = store.snapshot(db).get(named_ids(db, "moments"))[:, 0].astype(int).tolist()
            store.close()
        assert found in (after(last + 1), after(last + 2))
    shelf = Shelf(tmp_path / "index", E, uri)
    shelf._made = 10**6
    ids = shelf.add(drawn(1))
    np.testing.assert_array_equal(shelf.vectors.get(ids), drawn(1))
    shelf.catalog.compact()
    assert len(shelf.vectors) <= 2 * len(shelf.ids) + 1024
    shelf.close()
    assert uri or len(list((tmp_path / "index").iterdir())) <= 3  # no heap is left over


def test_searches_see_whole_states_while_one_writes(tmp_path, monkeypatch):
    """Files come by threes and go by threes, and half of the time all is copied."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("vop_jax.search.stores.heap.SLACK", 0)
    shelf = Shelf(tmp_path, E)
    shelf.add(drawn(3))
    index = Index.open(tmp_path)

    def search(_):
        hits = index.search(drawn(1), 1000)[0]
        scores = {hit.path: hit.score for hit in hits}
        assert len(hits) % 3 == 0
        return scores

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(search, range(60))
        for seed in range(10):
            shelf.add(drawn(3, seed=seed + 1))
            if seed % 2:
                shelf.remove(shelf.ids[:3])
                shelf.catalog.compact()
        found = list(answers)
    shelf.close()
    right = {}
    for seed in range(11):
        scores = (drawn(3, seed) @ drawn(1)[0]).tolist()
        right |= {f"{3 * seed + i}.mp4": score for i, score in enumerate(scores)}
    for scores in found:
        assert scores == pytest.approx({path: right[path] for path in scores}, abs=1e-5)
