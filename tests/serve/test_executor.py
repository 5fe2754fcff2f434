"""Many clients at once, and decoders that go wrong: each costs its own request alone."""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import threading

import pytest

from tests.serve import treacherous
from vop_jax.errors import VideoError
from vop_jax.serve import executor as executors
from vop_jax.serve.executor import Busy, Cache, Executor
from vop_jax.video import workers

CLIENTS = 20


def run(scenario, **options):
    """Runs `scenario(executor)` in an event loop of its own."""

    async def main():
        executor = Executor(1, **{"seconds": 30.0, "memory": 1 << 30} | options)
        try:
            return await scenario(executor)
        finally:
            await executor.close()

    return asyncio.run(main())


def test_each_client_gets_the_results_of_its_own_query(client, searcher):
    def query(i):
        return f"{['white', 'grey', 'black'][i % 3]} number {i} {'very ' * (i % 7)}"

    expected = {}
    for i in range(CLIENTS):
        hits = searcher.text(query(i), 3)
        expected[query(i)] = [(h.file_id, h.score, h.start, h.end) for h in hits]

    def ask(text):
        response = client.get("/api/search", params={"q": text, "k": 3})
        assert response.status_code == 200, response.text
        hits = response.json()["hits"]
        values = [(h["file_id"], h["score"], h["start"], h["end"]) for h in hits]
        return response.json()["query"], values

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask, [query(i) for i in range(CLIENTS)] * 2))
    assert all(hits == expected[text] for text, hits in answers)
    assert len({str(hits) for _, hits in answers}) > CLIENTS / 2  # the results differ


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
        responses = list(pool.map(ask, range(2 * CLIENTS)))
    for i, response in enumerate(responses):
        assert response.status_code == 200, response.text
        if i % 5 == 0:
            assert response.json()["hits"][0]["name"] == "a.mp4"
        if i % 5 == 4:
            assert response.content == content


def test_a_cache_keeps_what_was_used_last():
    cache = Cache(2)
    for i in range(3):
        cache.put(i, str(i))
        assert cache.get(0) == "0"
    assert [cache.get(i) for i in range(3)] == ["0", None, "2"]


def test_too_many_waiting_requests_are_refused(monkeypatch):
    monkeypatch.setattr(executors, "WAITING", 1)
    go = threading.Event()

    async def scenario(executor):
        running = [asyncio.create_task(executor.run_model(go.wait)) for _ in range(2)]
        await asyncio.sleep(0.05)  # one runs, one waits
        with pytest.raises(Busy):
            await executor.run_model(go.wait)
        go.set()
        await asyncio.gather(*running)

    run(scenario)


def test_a_decoder_that_goes_wrong_is_a_video_error_and_the_next_call_works(tmp_path):
    async def scenario(executor):
        first = await executor.decode(treacherous.process_id)
        assert await executor.decode(treacherous.process_id, 1, "two") == first != os.getpid()
        for call, reason in (
            (treacherous.crash, "crashed .SIGABRT"),
            (treacherous.hang, "more than 1 s"),
            (treacherous.swell, "too much memory"),
            (treacherous.fail, "^not decodable$"),
        ):
            with pytest.raises(VideoError, match=reason):
                await executor.decode(call)
        with pytest.raises(VideoError, match="not decodable"):  # decoders write no files
            await executor.decode(treacherous.write, tmp_path / "file")
        assert not (tmp_path / "file").read_bytes()
        second = await executor.decode(treacherous.process_id)
        os.kill(second, signal.SIGKILL)  # while it is idle
        executor._workers[0].process.join()
        third = await executor.decode(treacherous.process_id)
        assert len({first, second, third}) == 3

    run(scenario, seconds=1.0)


def test_a_cancelled_request_keeps_its_decoder_from_the_next_one():
    async def scenario(executor):
        process = await executor.decode(treacherous.process_id)
        request = asyncio.create_task(executor.decode(treacherous.hang))
        await asyncio.sleep(0.3)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        waiting = asyncio.create_task(executor.decode(treacherous.process_id))
        await asyncio.sleep(0.1)
        assert executor._decoders.statistics().tasks_waiting == 1
        assert await waiting != process  # the first one took more than its second

    run(scenario, seconds=1.0)


def test_processes_that_cannot_start_are_reported_and_tried_again(monkeypatch):
    broken, real = threading.Event(), workers.multiprocessing.get_context
    broken.set()

    class Context:
        def __getattr__(self, name):
            if name == "Process" and broken.is_set():
                raise BlockingIOError(11, "no more processes")
            return getattr(real("spawn"), name)

    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: Context())

    async def scenario(executor):
        with pytest.raises(Busy, match="no decoder could be started"):
            await executor.decode(treacherous.process_id)
        broken.clear()
        assert await executor.decode(treacherous.process_id) != os.getpid()

    run(scenario)
