"""Many clients at once, and decoders that go wrong: each costs its own request alone."""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from unittest import mock

import pytest

from tests.serve import treacherous
from vop_jax.errors import VideoError
from vop_jax.serve import executor as executors
from vop_jax.serve.executor import Busy, Cache, Executor
from vop_jax.video.workers import Worker

CLIENTS = 20


def run(scenario, seconds=60.0):
    """Runs `scenario(executor)` in an event loop of its own."""

    async def main():
        executor = Executor(1, seconds=seconds)
        try:
            return await scenario(executor)
        finally:
            await executor.close()

    return asyncio.run(main())


async def settle():
    """Lets all tasks of the event loop go on until they wait."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_each_of_many_clients_gets_the_results_of_its_own_request(client, films, searcher):
    content = (films[0] / "a.mp4").read_bytes()
    queries = [f"{('white', 'grey')[i % 2]} number {i} {'very ' * (i % 7)}" for i in range(CLIENTS)]

    def ask(i):
        if i % 4 == 0:
            return client.post("/api/search/video?k=1", files={"file": ("a", content)})
        paths = f"explain?q={i}&file_id=1", f"thumbnail/films/{1 + i % 4}?t={i % 3}"
        return client.get(f"/api/{paths[i % 2]}" if i % 4 < 3 else "/media/films/1")

    def search(text):
        hits = client.get("/api/search", params={"q": text, "k": 3}).json()["hits"]
        return [(h["file_id"], h["score"], h["start"], h["end"]) for h in hits]

    with concurrent.futures.ThreadPoolExecutor(2 * CLIENTS) as pool:
        others = [pool.submit(ask, i) for i in range(CLIENTS)]
        found = list(pool.map(search, queries * 2))
    expected = [
        [(h.file_id, h.score, h.start, h.end) for h in searcher.text(query, 3)] for query in queries
    ]
    assert found == expected * 2
    assert len(set(map(str, expected))) > CLIENTS / 2  # the results differ
    for i, response in enumerate(other.result() for other in others):
        assert response.status_code == 200, response.text
        if i % 4 == 0:
            assert response.json()["hits"][0]["name"] == "a.mp4"
        if i % 4 == 3:
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
        await settle()  # one runs, one waits
        with pytest.raises(Busy):
            await executor.run_model(go.wait)
        go.set()
        await asyncio.gather(*running)

    run(scenario)


def test_a_decoder_has_limits_and_any_failure_of_it_is_a_video_error(tmp_path):
    async def scenario(executor):
        executor.start()
        first = await executor.decode(treacherous.process_id)
        for call, reason in (
            (treacherous.swell, "too much memory"),
            (treacherous.fail, "^not decodable$"),
        ):
            with pytest.raises(VideoError, match=reason):
                await executor.decode(call)
        with pytest.raises(VideoError, match="not decodable"):  # decoders write no files
            await executor.decode(treacherous.write, tmp_path / "file")
        assert not (tmp_path / "file").read_bytes()
        assert await executor.decode(treacherous.process_id, 1, "two") == first != os.getpid()

    async def hang(executor):
        with pytest.raises(VideoError, match=r"more than 0\.1 s"):
            await executor.decode(treacherous.hang)

    run(scenario)
    run(hang, seconds=0.1)


def test_a_cancelled_request_keeps_its_decoder_from_the_next_one(monkeypatch):
    started, go = threading.Event(), threading.Event()

    def decode(worker, task):
        started.set()
        go.wait()
        return task[0]

    monkeypatch.setattr(Worker, "run", decode)

    async def scenario(executor):
        request = asyncio.create_task(executor.decode("first"))
        await asyncio.to_thread(started.wait)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        waiting = asyncio.create_task(executor.decode("second"))
        await settle()
        assert executor._decoders.statistics().tasks_waiting == 1
        go.set()
        assert await waiting == "second"

    run(scenario)


def test_processes_that_cannot_start_are_reported_and_tried_again(monkeypatch):
    calls = mock.Mock(side_effect=[BlockingIOError(11, "no more processes"), "a result"])
    monkeypatch.setattr(Worker, "run", calls)

    async def scenario(executor):
        with pytest.raises(Busy, match="no decoder could be started"):
            await executor.decode("call")
        assert await executor.decode("call") == "a result"

    run(scenario)
