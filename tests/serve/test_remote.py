"""Videos that were indexed on a web server pass through this one, in the ranges that are wanted."""

import pytest

from tests.search import library, web
from vop_jax.search.index import Index
from vop_jax.search.searcher import Searcher

pytest.importorskip("aiohttp", reason="fsspec reads https:// with it")


@pytest.fixture(scope="module")
def site(tmp_path_factory, films):
    folder = library.copy(films[0], tmp_path_factory.mktemp("site") / "films")
    with web.serving(folder) as served:
        yield served


@pytest.fixture(scope="module")
def remote(tmp_path_factory, serve, site, retriever):
    root = tmp_path_factory.mktemp("remote")
    (root / "list.csv").write_text(f"video\n{site.address}/a.mp4\n{site.address}/c.mp4\n")
    library.make(root / "index", root / "list.csv", retriever, window=1.0)
    return serve({"remote": Searcher(Index(root / "index"), retriever)})


def test_a_remote_video_is_shown(remote, site):
    body = remote.get("/api/search?q=white&min_score=none").json()
    assert {hit["name"] for hit in body["hits"]} == {f"{site.address}/{n}.mp4" for n in "ac"}
    assert not any(hit["missing"] for hit in body["hits"])
    hit = body["hits"][0]
    data = (site.folder / hit["name"].rpartition("/")[2]).read_bytes()
    address = f"/media/remote/{hit['file_id']}"
    whole = remote.get(address)
    assert (whole.status_code, whole.content) == (200, data)
    assert whole.headers["content-type"] == "video/mp4"
    for text, part in (
        ("bytes=10-19", data[10:20]),
        ("bytes=100-", data[100:]),
        ("bytes=-7", data[-7:]),
        ("bytes=0-9999999", data),
    ):
        answer = remote.get(address, headers={"Range": text})
        assert (answer.status_code, answer.content) == (206, part)
        assert answer.headers["content-range"].endswith(f"/{len(data)}")
    assert remote.get(address, headers={"Range": "bytes=0-1,4-5"}).content == data
    known = {"If-None-Match": whole.headers["etag"]}
    assert remote.get(address, headers=known).status_code == 304
    head = remote.head(address)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(data)))
    assert remote.get(address, headers={"Range": f"bytes={len(data)}-"}).status_code == 416
    picture = remote.get(f"/api/thumbnail/remote/{hit['file_id']}?t=0.5")
    assert picture.headers["content-type"] == "image/jpeg"
    moment = {"q": "white", "file_id": hit["file_id"], "start": 0.0, "end": 1.0}
    assert len(remote.get("/api/explain", params=moment).json()["seconds"]) == 3


def test_a_remote_video_that_changed_is_gone(remote, site):
    ids = {file["name"]: file["file_id"] for file in remote.get("/api/files").json()["files"]}
    own = ids[f"{site.address}/c.mp4"]
    (site.folder / "c.mp4").write_bytes((site.folder / "a.mp4").read_bytes())
    for address in (f"/media/remote/{own}", f"/api/thumbnail/remote/{own}"):
        answer = remote.get(address)
        assert answer.status_code == 404 and "has changed" in answer.json()["error"]
    (site.folder / "c.mp4").unlink()
    assert "cannot be read" in remote.get(f"/media/remote/{own}").json()["error"]
