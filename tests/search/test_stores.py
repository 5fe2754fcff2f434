"""Every store: what is put is found again, exactly, whatever happens in between."""

import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vop_jax.errors import UserError
from vop_jax.search.store import open_store

E = 8
ROOT = pathlib.Path(__file__).parents[2]
KINDS = ("exact", "milvus")


@pytest.fixture(params=KINDS)
def uri(request, tmp_path):
    if request.param == "exact":
        return str(tmp_path / "store")
    pytest.importorskip("pymilvus", reason="pip install '.[milvus]'")
    pytest.importorskip("milvus_lite", reason="pip install '.[milvus]'")
    return str(tmp_path / "store.db")


@pytest.fixture
def store(uri):
    opened = open_store(uri, E, write=True)
    yield opened
    opened.close()


def drawn(count, seed=0, width=E):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def brute_force(content, queries, k, allowed=None):
    """What a search must answer, of {id: vector}: scores in float64, ties by id."""
    ids = sorted(id for id in content if allowed is None or id in allowed)
    found = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf)
    if ids:
        similar = queries.astype(float) @ np.stack([content[id] for id in ids]).astype(float).T
        order = np.argsort(-similar.astype(np.float32), axis=1, kind="stable")[:, :k]
        found[:, : len(ids)] = np.array(ids)[order]
        scores[:, : len(ids)] = np.take_along_axis(similar, order, axis=1)
    return found, scores


def assert_finds(store, content, queries, k, allowed=None):
    listed = None if allowed is None else np.array(sorted(allowed), np.int64)
    ids, scores = store.search(queries, k, listed)
    _, best = brute_force(content, queries, k, allowed)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    assert ids.shape == scores.shape == (len(queries), k)
    np.testing.assert_allclose(scores, best, atol=1e-5)
    for query, row, of_row in zip(queries, ids, scores, strict=True):
        real = row[row >= 0]
        assert len(set(real)) == len(real)
        assert allowed is None or set(real) <= set(allowed)
        # Whatever ties did: each score is that of its id.
        own = np.array([content[id] @ query for id in real])
        np.testing.assert_allclose(of_row[: len(real)], own, atol=1e-5)
        assert (of_row[len(real) :] == -np.inf).all()


def test_an_empty_store(store):
    assert len(store) == 0
    assert store.ids().tolist() == []
    ids, scores = store.search(drawn(2), 3)
    assert (ids == -1).all() and (scores == -np.inf).all()
    assert ids.shape == (2, 3)
    assert store.get([]).shape == (0, E)


def test_put_get_replace_delete(store):
    vectors = drawn(5)
    store.put([7, 3, 2**40, 0, 5], vectors)
    assert store.ids().tolist() == [0, 3, 5, 7, 2**40]
    np.testing.assert_array_equal(store.get([2**40, 7, 7]), vectors[[2, 0, 0]])
    store.put([3, 4], drawn(2, seed=1))
    assert len(store) == 6
    np.testing.assert_array_equal(store.get([4, 3]), drawn(2, seed=1)[::-1])
    store.delete([3, 99, 3])
    assert store.ids().tolist() == [0, 4, 5, 7, 2**40]
    with pytest.raises(UserError, match="has no id 3"):
        store.get([0, 3])
    store.put([3], vectors[:1])
    np.testing.assert_array_equal(store.get([3]), vectors[:1])


def test_of_an_id_given_twice_the_last_counts(store):
    store.put([1, 2, 1], drawn(3))
    assert len(store) == 2
    np.testing.assert_array_equal(store.get([1, 2]), drawn(3)[[2, 1]])


def test_search_equals_brute_force(store):
    vectors = drawn(300)
    ids = np.random.default_rng(1).permutation(1000)[:300]
    store.put(ids, vectors)
    store.delete(ids[:50])
    store.put(ids[50:60], drawn(10, seed=2))
    vectors[50:60] = drawn(10, seed=2)
    content = dict(zip(ids[50:].tolist(), vectors[50:], strict=True))
    queries = drawn(5, seed=3)
    for k in (1, 10, 250):
        expected, _ = brute_force(content, queries, k)
        np.testing.assert_array_equal(store.search(queries, k)[0], expected)
        assert_finds(store, content, queries, k)


def test_a_search_among_allowed_ids(store):
    vectors = drawn(200)
    store.put(np.arange(200), vectors)
    content = dict(enumerate(vectors))
    queries = drawn(3, seed=1)
    for allowed in ([], [5], [199, 3, 3, 5000], list(range(0, 200, 2)), list(range(400))):
        expected, _ = brute_force(content, queries, 4, allowed)
        np.testing.assert_array_equal(store.search(queries, 4, np.array(allowed))[0], expected)
        assert_finds(store, content, queries, 4, set(allowed))


def test_more_than_there_are(store):
    store.put([4, 2], drawn(2))
    ids, scores = store.search(drawn(1), 5)
    assert sorted(ids[0, :2]) == [2, 4] and ids[0, 2:].tolist() == [-1] * 3
    assert scores[0, 2:].tolist() == [-np.inf] * 3
    ids, _ = store.search(drawn(1), 5, np.array([2, 3]))
    assert ids[0].tolist() == [2, -1, -1, -1, -1]


def test_ties_go_to_the_smaller_id(store):
    # Whole numbers: no order of summing rounds them.
    same = np.tile(np.arange(E, dtype=np.float32), (400, 1))
    ids = np.random.default_rng(0).permutation(400)
    store.put(ids[:300], same[:300])
    store.put(ids[300:], same[300:])
    store.put([1000], 2 * same[:1])
    found, scores = store.search(same[:1], 6)
    assert found[0].tolist() == [1000, 0, 1, 2, 3, 4]
    assert len(set(scores[0, 1:])) == 1
    assert store.search(same[:1], 2, np.arange(50, 90))[0][0].tolist() == [50, 51]


def test_reopened(uri):
    with_content = open_store(uri, E, write=True)
    with_content.put(np.arange(20), drawn(20))
    with_content.delete([3])
    with_content.put([4], drawn(1, seed=1))
    with_content.close()
    with_content.close()
    again = open_store(uri, E, write=False)
    assert again.ids().tolist() == [i for i in range(20) if i != 3]
    np.testing.assert_array_equal(again.get([4, 5]), [drawn(1, seed=1)[0], drawn(20)[5]])
    assert again.search(drawn(20)[5:6] * 10, 1)[0].shape == (1, 1)
    again.close()


def test_open_to_read_only(uri):
    open_store(uri, E, write=True).close()
    reader = open_store(uri, E, write=False)
    for change in (lambda: reader.put([1], drawn(1)), lambda: reader.delete([1])):
        with pytest.raises(UserError, match="open to read only"):
            change()
    reader.close()


def test_no_store_to_read(uri):
    with pytest.raises(UserError, match=r"store .*: no vector store"):
        open_store(uri, E, write=False)
    assert not pathlib.Path(uri).exists()


def test_another_width(uri):
    open_store(uri, E, write=True).close()
    with pytest.raises(UserError, match=r"holds vectors of 8 numbers, not of 9"):
        open_store(uri, E + 1, write=False)
    open_store(uri, E, write=True).close()  # nobody holds it


@pytest.mark.parametrize(
    ("ids", "vectors", "says"),
    [
        ([1], drawn(1, width=E + 1), r"vectors: shape \[1, 9\]; must be \[N, 8\]"),
        ([1], drawn(1)[0], r"vectors: shape \[8\]"),
        ([1], np.full((1, E), np.nan), "NaN or infinite"),
        ([1, 2], np.full((2, E), [[1.0], [np.inf]]), "NaN or infinite"),
        ([1, 2], drawn(1), "2 ids for 1 vectors"),
        ([-1], drawn(1), "ids: -1; must be 0 or more"),
        ([0.5], drawn(1), r"ids: float64 \[1\]; must be int64"),
    ],
)
def test_bad_vectors_are_refused_and_nothing_changes(store, ids, vectors, says):
    store.put([1], drawn(1))
    with pytest.raises(UserError, match=says):
        store.put(ids, vectors)
    assert store.ids().tolist() == [1]
    np.testing.assert_array_equal(store.get([1]), drawn(1))


@pytest.mark.parametrize(
    ("queries", "k", "says"),
    [
        (drawn(1, width=3), 1, r"queries: shape \[1, 3\]"),
        (np.full((1, E), np.nan), 1, "queries: NaN"),
        (drawn(1), 0, "k=0: must be 1 or more"),
    ],
)
def test_bad_searches(store, queries, k, says):
    store.put([1], drawn(1))
    with pytest.raises(UserError, match=says):
        store.search(queries, k)


def test_no_queries(store):
    store.put([1], drawn(1))
    ids, scores = store.search(np.empty((0, E), np.float32), 3)
    assert ids.shape == scores.shape == (0, 3)


@pytest.mark.parametrize("name", ["", "s3://bucket/store"])
def test_a_name_that_is_no_store(name):
    with pytest.raises(UserError, match=r"store.*: .*FILE.db"):
        open_store(name, E, write=True)


numbers = st.integers(-4, 4).map(float)
vector = st.lists(numbers, min_size=3, max_size=3)
change = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(st.integers(0, 12), vector), max_size=6)),
    st.tuples(st.just("delete"), st.lists(st.integers(0, 12), max_size=4)),
    st.tuples(st.just("reopen"), st.none()),
)


@given(
    changes=st.lists(change, max_size=12),
    query=vector,
    k=st.integers(1, 15),
    allowed=st.none() | st.sets(st.integers(0, 14)),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_history(tmp_path_factory, monkeypatch, changes, query, k, allowed):
    """Small whole numbers, so that ties are many and exact; compacted at every occasion."""
    monkeypatch.setattr("vop_jax.search.exact.SLACK", 0)
    uri = str(tmp_path_factory.mktemp("history") / "store")
    store, content = open_store(uri, 3, write=True), {}
    for what, given_ in changes:
        if what == "put":
            ids = np.array([id for id, _ in given_], np.int64)
            vectors = np.array([v for _, v in given_], np.float32).reshape(-1, 3)
            store.put(ids, vectors)
            content.update(zip(ids.tolist(), vectors, strict=True))
        elif what == "delete":
            store.delete(np.array(given_, np.int64))
            for id in given_:
                content.pop(id, None)
        else:
            store.close()
            store = open_store(uri, 3, write=True)
    queries = np.array([query], np.float32)
    listed = None if allowed is None else np.array(list(allowed), np.int64)
    ids, scores = store.search(queries, k, listed)
    expected, best = brute_force(content, queries, k, allowed)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(scores, best)
    assert store.ids().tolist() == sorted(content)
    for id, row in content.items():
        np.testing.assert_array_equal(store.get([id])[0], row)
    store.close()


# Puts, replaces and deletes; prints a number once the change of this number has returned.
WRITER = """
import sys
import numpy as np
from vop_jax.search import exact
from vop_jax.search.store import open_store
exact.SLACK = 64
store = open_store(sys.argv[1], 8, write=True)
for step in range(10_000):
    ids = np.arange(step % 7 * 10, step % 7 * 10 + 20)
    if step % 5 == 4:
        store.delete(ids)
    else:
        store.put(ids, np.full((20, 8), step, np.float32))
    print(step, flush=True)
"""


def after(steps):
    """What WRITER leaves after so many changes: {id: number in its vector}."""
    content = {}
    for step in range(steps):
        for id in range(step % 7 * 10, step % 7 * 10 + 20):
            if step % 5 == 4:
                content.pop(id, None)
            else:
                content[id] = step
    return content


@pytest.mark.parametrize("acknowledged", [1, 40, 160])
def test_killed_while_it_writes(uri, acknowledged):
    command = [sys.executable, "-c", WRITER, uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        for line in writer.stdout:
            if int(line) == acknowledged:
                break
        writer.send_signal(signal.SIGKILL)
        last = int((line + writer.stdout.read()).split()[-1])
    store = open_store(uri, E, write=True)
    ids = store.ids()
    found = dict(zip(ids.tolist(), store.get(ids)[:, 0].astype(int).tolist(), strict=True))
    # The change that was under way is there as a whole or not at all.
    assert found in (after(last + 1), after(last + 2))
    store.put([500], drawn(1))
    np.testing.assert_array_equal(store.get([500]), drawn(1))
    store.close()


def test_threads_search_while_one_writes(store):
    from concurrent.futures import ThreadPoolExecutor

    fixed = drawn(50)
    store.put(np.arange(50), fixed)

    def search(seed):
        query = fixed[seed % 50 : seed % 50 + 1]
        ids, scores = store.search(query, 50, np.arange(50))
        return ids, scores, brute_force(dict(enumerate(fixed)), query, 50)

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(search, range(40))
        for i in range(10):
            store.put(np.arange(100, 140), drawn(40, seed=i))
        for ids, scores, (expected, best) in answers:
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_allclose(scores, best, atol=1e-5)
