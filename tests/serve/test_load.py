"""Many clients at once: each gets its own answer."""

import concurrent.futures
import threading

import anyio
import pytest

from vop_jax.serve.executor import Kept, Work
from vop_jax.serve.sandbox import Busy

CLIENTS = 50


def query(i):
    return f"{['white', 'grey', 'black'][i % 3]} number {i} {'very ' * (i % 7)}"


def test_each_of_fifty_gets_the_answer_of_a_lone_query(serve, searcher):
    expected = {}
    for i in range(CLIENTS):
        hits = searcher.text(query(i), 3)
        expected[query(i)] = [(h.file_id, h.score, h.start, h.end) for h in hits]
    client = serve()

    def ask(text):
        answer = client.get("/api/search", params={"q": text, "k": 3})
        assert answer.status_code == 200, answer.text
        said = answer.json()
        return said["query"], [
            (h["file_id"], h["score"], h["start"], h["end"]) for h in said["hits"]
        ]

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask, [query(i) for i in range(CLIENTS)] * 3))
    assert len(answers) == 3 * CLIENTS
    assert all(hits == expected[text] for text, hits in answers)
    assert len({str(hits) for _, hits in answers}) > CLIENTS / 2  # they do differ


def test_queries_pictures_films_and_uploads_at_once(client, films):
    content = (films[0] / "a.mp4").read_bytes()

    def ask(i):
        if i % 5 == 0:
            return client.post("/api/search/video?k=1", files={"file": ("a", content)})
        address = (
            f"/api/search?q={i}&k=1",
            f"/api/explain?q={i}&file_id=1",
            f"/api/thumbnail/films/{1 + i % 4}?t={i % 3}",
            "/media/films/1",
        )[i % 5 - 1]
        return client.get(address)

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask, range(2 * CLIENTS)))
    for i, answer in enumerate(answers):
        # Of the uploads eight are taken in at a time.
        assert answer.status_code == 200 or (i % 5 == 0 and answer.status_code == 503), answer.text
        if i % 5 == 0 and answer.status_code == 200:
            assert answer.json()["hits"][0]["name"] == "a.mp4"
        if i % 5 == 4:
            assert answer.content == content


def test_what_is_kept_is_bounded():
    kept = Kept(2)
    for i in range(3):
        kept.put(i, str(i))
        assert kept.get(0) == "0"  # asked for, so not the oldest
    assert [kept.get(i) for i in range(3)] == ["0", None, "2"]


def test_too_many_that_wait_are_refused(monkeypatch):
    monkeypatch.setattr("vop_jax.serve.executor.WAITING", 1)
    go = threading.Event()

    async def main():
        work = Work(None)
        async with anyio.create_task_group() as group:
            for _ in range(2):  # one runs, one waits
                group.start_soon(work.model, go.wait)
                await anyio.sleep(0.01)
            with pytest.raises(Busy):
                await work.model(go.wait)
            go.set()

    anyio.run(main)
