"""The library without a query: files, folders, neighbours of a moment, similar moments."""

import numpy as np
import pytest

from tests.search.shelf import DATE, Shelf
from vop_jax.search.index import Index

NEWEST = ["sub/d.mp4", "c.mp4", "sub/b.mp4", "a.mp4"]


def listed(client, **parameters):
    body = client.get("/api/files", params=parameters).json()
    return body["total"], [file["name"] for file in body["files"]]


def test_files_are_listed_newest_first_or_by_folder_in_pages(client, searcher):
    assert listed(client) == (4, NEWEST)
    by_folder = ["a.mp4", "c.mp4", "sub/b.mp4", "sub/d.mp4"]
    assert listed(client, order="folder") == (4, by_folder)
    assert listed(client, k=3, offset=2) == (4, NEWEST[2:])
    assert listed(client, offset=4) == (4, [])
    assert listed(client, folder="sub", until="2023-11-16") == (1, ["sub/b.mp4"])
    (file,) = client.get("/api/files?k=1&order=folder").json()["files"]
    assert file == {
        **{"file_id": 1, "name": "a.mp4", "start": 0.0, "end": 3.0},
        **{"modified": DATE, "moments": 5, "missing": False},
    }
    assert client.get("/api/files?since=then").status_code == 400
    assert client.get("/api/files?order=random").status_code == 422


def test_hits_have_the_date_of_their_file(client):
    hits = client.get("/api/search?q=white").json()["hits"]
    times = {hit["name"]: hit["modified"] for hit in hits}
    assert times == {name: DATE + 86400 * i for i, name in enumerate(reversed(NEWEST))}


def test_folders_continue_what_is_typed(tmp_path):
    folders = ("", "2025/", "2026/one/", "2026/two/deep/", "2026-old/", "202/", "ü/", "z0/", "z/")
    shelf = Shelf(tmp_path / "index", folders=folders)
    shelf.add(np.eye(8, dtype=np.float32).repeat(3, 0))
    index = Index(tmp_path / "index")
    # In the order of paths, in which "-" is before "/".
    assert index.list_folders("", 99) == [*("202", "2025", "2026-old", "2026", "z", "z0", "ü")]
    assert index.list_folders("", 2) == ["202", "2025"]
    assert index.list_folders("2026", 99) == ["2026-old", "2026"]
    assert index.list_folders("2026/", 99) == ["2026/one", "2026/two"]
    assert index.list_folders("2026/t", 99) == ["2026/two"]
    for prefix in ("none", "/", "../", "2026/two/deep/"):
        assert index.list_folders(prefix, 99) == []


def test_the_api_suggests_folders(client):
    assert client.get("/api/folders").json() == ["sub"]
    assert client.get("/api/folders", params={"prefix": "sub/\0"}).json() == []


def test_neighbours_of_a_moment(client):
    def around(start, end):
        parameters = {"file_id": 1, "start": start, "end": end}
        body = client.get("/api/neighbours", params=parameters).json()
        ends = (body[name] and (body[name]["start"], body[name]["end"]) for name in SIDES)
        return body["number"], body["count"], *ends

    SIDES = "previous", "next"
    assert around(0, 3) == (0, 5, None, (0.0, 1.0))  # the whole clip
    assert around(0, 1) == (1, 5, None, (0.5, 1.5))
    assert around(1.5, 2.5) == (4, 5, (1.0, 2.0), (2.0, 3.0))
    assert around(2, 3) == (5, 5, (1.5, 2.5), None)


def test_similar_moments_are_those_of_other_files(client, searcher):
    (file,) = client.get("/api/files?k=1&folder=sub&until=2023-11-16").json()["files"]
    own = file["file_id"]
    parameters = {"file_id": own, "start": 0.5, "end": 1.5, "k": 2}
    body = client.get("/api/similar", params=parameters).json()
    vector = searcher.index.moment_vector(own, 0.5, 1.5)
    expected = [hit for hit in searcher.nearest(vector, 4) if hit.file_id != own][:2]
    assert body["query"] == "sub/b.mp4"
    assert [(h["file_id"], h["start"]) for h in body["hits"]] == [
        (hit.file_id, hit.start) for hit in expected
    ]
    assert searcher.nearest(vector, 1)[0].score == pytest.approx(1)


@pytest.mark.parametrize("path", ["neighbours", "similar"])
def test_moments_that_do_not_exist(client, path):
    for query in ("file_id=99&start=0&end=1", "file_id=1&start=0&end=1.25"):
        response = client.get(f"/api/{path}?{query}")
        assert response.status_code == 404 and "in the index" in response.json()["error"]
    assert client.get(f"/api/{path}?file_id=1&start=nan&end=1").status_code == 422
