"""Bringing a served index up to date through the API."""

import sys

import pytest

from tests.processes import until
from tests.search import library
from vop_jax.search.searcher import open_searcher
from vop_jax.serve import reindex

TOKEN = "a-long-token"
ADDRESS = "/api/reindex/films"
# Shows a progress bar, and ends when a file appears.
PROGRAM = """
import pathlib, sys, time
sys.stderr.write("2 files:   0%|  | 0/9\\r2 files:  40%|==  | 4/9\\n"); sys.stderr.flush()
while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)
print("index: 2 added") if sys.argv[2] == "done" else sys.exit("error: the disk is full")
"""


@pytest.fixture
def guarded(serve, films, retriever, tmp_path):
    directory = library.copy(films[1], tmp_path / "index")
    client = serve({"films": open_searcher(directory, retriever=retriever)}, token=TOKEN)
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    return client


def ended(client):
    """The last run, when it has ended."""
    until(lambda: client.get(ADDRESS).json()["state"] != "running")
    return client.get(ADDRESS).json()


@pytest.mark.parametrize("end", ["done", "failed"])
def test_one_run_at_a_time_says_how_far_it_is(guarded, monkeypatch, tmp_path, end):
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "go on"), end]
    monkeypatch.setattr(reindex, "command", lambda *_: arguments)
    assert guarded.get(ADDRESS).json()["state"] == "never"
    response = guarded.post(ADDRESS)
    assert (response.status_code, response.json()["state"]) == (202, "running")
    until(lambda: guarded.get(ADDRESS).json()["progress"] == 0.4)
    response = guarded.post(ADDRESS)
    line = "index films is being brought up to date; try later"
    assert (response.status_code, response.json()) == (409, {"error": line})
    assert guarded.get("/api/search?q=white").status_code == 200
    (tmp_path / "go on").touch()
    run = ended(guarded)
    assert run["state"] == end and run["seconds"] > 0
    reports = {"done": ("index: 2 added", 1.0), "failed": ("error: the disk is full", 0.4)}
    assert (run["report"], run["progress"]) == reports[end]
    assert guarded.post(ADDRESS).status_code == 202  # again; the end of the server ends it
    assert guarded.post("/api/reindex/none").status_code == 404


def test_without_a_token_it_is_refused(client):
    line = "reindex: only on a server with a token; start it with --token"
    for response in (client.post(ADDRESS), client.get(ADDRESS)):
        assert (response.status_code, response.json()) == (403, {"error": line})


@pytest.mark.slow
def test_searches_see_the_new_index(clip, retriever, serve, tmp_path):
    folder = tmp_path / "videos"
    library.write_films(folder, count=1)
    library.make(tmp_path / "index", folder, retriever, clip=str(clip))
    opened = open_searcher(tmp_path / "index", retriever=retriever)
    client = serve({"films": opened}, token=TOKEN)
    client.headers["Authorization"] = f"Bearer {TOKEN}"

    def names():
        return {hit["name"] for hit in client.get("/api/search?q=white").json()["hits"]}

    assert names() == {"a.mp4"}
    library.write_film(folder / "new.mp4", 20)
    assert client.post(ADDRESS).status_code == 202
    run = ended(client)
    assert run["state"] == "done" and "1 added" in run["report"], run
    assert names() == {"a.mp4", "new.mp4"}
