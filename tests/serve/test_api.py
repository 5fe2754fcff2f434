"""What the server answers, and what it says to wrong questions."""

import gzip
import io
import os
import shutil
import tempfile

import numpy as np
import pytest
from PIL import Image

from tests.search import library
from tests.serve import treacherous
from tests.video import videos
from vop_jax.search.index import Hit
from vop_jax.search.searcher import open_searcher
from vop_jax.serve import schemas
from vop_jax.serve.media import VideoResponse
from vop_jax.serve.middleware import error


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where uploads go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def own(films, retriever, tmp_path, serve):
    """(client, folder) of an index whose films may be changed."""
    library.copy(films[0], tmp_path / "films")
    library.make(tmp_path / "index", tmp_path / "films", retriever)
    searcher = open_searcher(tmp_path / "index", retriever=retriever)
    return serve({"own": searcher}), tmp_path / "films", searcher


def listed(answer):
    return [(h["name"], h["score"], h["start"], h["end"]) for h in answer.json()["hits"]]


def expected(hits):
    return [(hit.path, pytest.approx(hit.score, abs=1e-5), hit.start, hit.end) for hit in hits]


def jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def test_indexes(client, films, searcher):
    (about,) = client.get("/api/indexes").json()
    assert about.pop("clip")
    assert about == {
        "name": "films",
        "method": "zero_shot",
        "folder": str(films[0]),
        "files": 4,
        "moments": searcher.index.counts()["moments"],
        "captions": 2,
        "frames": 3,
    }


def test_search(client, searcher):
    answer = client.get("/api/search", params={"q": "white", "index": "films", "k": 2})
    hits = searcher.text("white", 2)
    assert listed(answer) == expected(hits)
    said = answer.json()
    assert (said["query"], said["cut"]) == ("white", False)
    first = said["hits"][0]
    assert first["file_id"] == hits[0].file_id
    assert (first["caption"], first["missing"]) == ("", False)


def test_a_long_query_is_cut_and_said(client):
    assert client.get("/api/search", params={"q": "word " * 300}).json()["cut"]


def test_filters(client, searcher):
    for filters in ({"since": "0001-01-01"}, {"until": "9999-12-31"}, {"until": "9999-12-31T23"}):
        answer = client.get("/api/search", params={"q": "white", **filters})
        assert len(answer.json()["hits"]) == 4
    for filters in ({"folder": "sub"}, {"since": "2023-11-16"}, {"until": "2023-11-15"}):
        answer = client.get("/api/search", params={"q": "white", **filters})
        assert listed(answer) == expected(searcher.text("white", **filters))
        assert 0 < len(answer.json()["hits"]) < 4
    empty = {"folder": "", "since": "", "until": ""}
    assert len(client.get("/api/search", params={"q": "white", **empty}).json()["hits"]) == 4


def test_search_by_a_video(client, films, searcher, temporary):
    film = films[0] / "a.mp4"
    for to in ("videos", "captions"):
        with open(film, "rb") as file:
            parameters = {"to": to, "k": 2}
            answer = client.post("/api/search/video", params=parameters, files={"file": file})
        assert [h["name"] for h in answer.json()["hits"]] == [
            hit.path for hit in searcher.video(film, 2, to=to)
        ]
    assert answer.json()["query"] == "a.mp4"
    assert [hit["end"] for hit in answer.json()["hits"]] == [None, None]
    assert {hit["caption"] for hit in answer.json()["hits"]} == {
        "grey becomes white",
        "another film",
    }
    assert not list(temporary.iterdir())


def test_search_by_a_picture(client, searcher, temporary, tmp_path_factory):
    pixels = np.full((40, 60, 3), 200, np.uint8)
    path = tmp_path_factory.mktemp("picture") / "a.jpg"
    path.write_bytes(jpeg(pixels))
    answer = client.post("/api/search/image", params={"k": 3}, files={"file": path.read_bytes()})
    assert listed(answer) == expected(searcher.image(path, 3))
    assert not list(temporary.iterdir())


def test_explain(client, searcher):
    hit = searcher.text("white", 1)[0]
    parameters = {"q": "white", "file_id": hit.file_id, "start": hit.start, "end": hit.end}
    answer = client.get("/api/explain", params=parameters).json()
    seconds, scores = searcher.explain("white", hit)
    assert answer["seconds"] == pytest.approx(seconds)
    assert answer["scores"] == pytest.approx(scores, abs=1e-5)


def test_thumbnail(client):
    levels = []
    for t in (0, 1, 2.9, 99):
        answer = client.get("/api/thumbnail/films/1", params={"t": t})
        assert answer.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(answer.content)) as picture:
            levels.append(videos.level_of(np.asarray(picture.convert("RGB"))))
    assert levels[0] < levels[1] < levels[2] == levels[3]


def test_a_thumbnail_is_small_and_made_once(own, retriever, monkeypatch):
    client, folder, searcher = own
    videos.write(folder / "a.mp4", 10, width=640, height=480)
    assert client.get("/api/thumbnail/own/1").status_code == 404  # it is not what was indexed
    library.make(searcher.index.directory, folder, retriever)
    hits = client.get("/api/search?q=a").json()["hits"]
    (address,) = (f"/api/thumbnail/own/{h['file_id']}" for h in hits if h["name"] == "a.mp4")
    first = client.get(address).content
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.size == (320, 240)
    monkeypatch.setattr("vop_jax.serve.executor.Sandbox.submit", None)
    assert client.get(address).content == first


def test_media_whole_and_in_ranges(client, films):
    content = (films[0] / "a.mp4").read_bytes()
    whole = client.get("/media/films/1")
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["content-type"] == "video/mp4"
    for asked, part in [("0-9", content[:10]), ("10-", content[10:]), ("-7", content[-7:])]:
        answer = client.get("/media/films/1", headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, part)
    parts = client.get("/media/films/1", headers={"Range": "bytes=0-1,-2"})
    assert parts.status_code == 206 and content[-2:] in parts.content
    for asked, status in [
        (f"bytes={len(content)}-", 416),
        ("bytes=-0", 416),
        (f"bytes=0-1,{10**30}-", 416),
        ("bytes=5-2", 400),
        ("bytes=a-b", 400),
        ("lines=1-2", 400),
    ]:
        wrong = client.get("/media/films/1", headers={"Range": asked})
        assert wrong.status_code == status and list(wrong.json()) == ["error"]
        assert (wrong.headers.get("content-range") == f"bytes */{len(content)}") == (status == 416)
    wrong = client.get("/static/page.js", headers={"Range": "bytes=9-1"})
    assert wrong.status_code == 400 and list(wrong.json()) == ["error"]
    for condition, status in [(whole.headers["etag"], 206), ('"other"', 200), ("W/1", 200)]:
        headers = {"Range": "bytes=0-9", "If-Range": condition}
        assert client.get("/media/films/1", headers=headers).status_code == status


@pytest.mark.parametrize(
    "address", ["/", "/static/page.js", "/media/films/1", "/api/thumbnail/films/1"]
)
def test_what_a_client_has_already(client, address):
    first = client.get(address)
    tag, date = first.headers["etag"], first.headers["last-modified"]
    for name, value, status in [
        ("If-None-Match", tag, 304),
        ("If-None-Match", f'"other", W/{tag}', 304),
        ("If-None-Match", '"other"', 200),
        ("If-Modified-Since", date, 304),
        ("If-Modified-Since", "Sat, 01 Jan 2000 00:00:00 GMT", 200),
        ("If-Modified-Since", "yesterday", 200),
    ]:
        answer = client.get(address, headers={name: value})
        assert answer.status_code == status, (name, value)
        assert answer.content == (b"" if status == 304 else first.content)
        assert answer.headers["etag"] == tag


@pytest.mark.parametrize(
    "address",
    [
        *("/", "/docs", "/healthz", "/static/page.js", "/media/films/1", "/api/indexes"),
        *("/api/search?q=a", "/api/explain?q=a&file_id=1", "/api/thumbnail/films/1"),
    ],
)
def test_methods(client, address):
    whole, head = client.get(address), client.head(address)
    assert (whole.status_code, head.status_code) == (200, 200)
    for name in ("content-length", "content-type"):
        assert head.headers[name] == whole.headers[name]
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "NONSENSE"):
        answer = client.request(method, address)
        assert answer.status_code == 405 and list(answer.json()) == ["error"], method


def test_a_folder_whose_name_is_not_utf8(own, serve, retriever, tmp_path):
    _, folder, _ = own
    folder.rename(moved := tmp_path / os.fsdecode(b"films \xff\x1b[2J"))
    library.make(tmp_path / "new", moved, retriever)
    client = serve({"own": open_searcher(tmp_path / "new", retriever=retriever)})
    (about,) = client.get("/api/indexes").json()
    assert about["folder"].endswith("films \ufffd\x1b[2J") and about["files"] == 4
    hits = client.get("/api/search?q=white").json()["hits"]
    assert len(hits) == 4 and not any(hit["missing"] for hit in hits)
    content = (moved / hits[0]["name"]).read_bytes()
    assert client.get(f"/media/own/{hits[0]['file_id']}").content == content
    assert client.get(f"/api/thumbnail/own/{hits[0]['file_id']}").status_code == 200


def test_file_names_that_are_not_utf8(searcher, films, tmp_path):
    """No index holds one today; a caption may name one."""
    name = os.fsdecode(b"\xff\n.mp4")
    (hit,) = schemas.found(searcher, [Hit(1, name, 0.5, 0.0, 1.0, "\ud800")])
    assert (hit.name, hit.caption, hit.missing) == ("\ufffd\n.mp4", "\ufffd", True)
    with open(films[0] / "a.mp4", "rb") as file:
        headers = VideoResponse(file, name).headers
    assert headers["content-disposition"] == "inline; filename*=utf-8''%EF%BF%BD%0A.mp4"
    assert error(400, name).body == '{"error":"\ufffd .mp4"}'.encode()


def test_pages(client):
    assert client.get("/").headers["content-type"].startswith("text/html")
    for name, kind in [("page.css", "text/css"), ("page.js", "text/javascript")]:
        assert client.get(f"/static/{name}").headers["content-type"].startswith(kind)
    docs = client.get("/docs").text
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in docs
    assert "http" not in docs.lower()  # nothing from elsewhere


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("/api/search", 422, "q: "),
        ("/api/search?q=", 400, "empty"),
        ("/api/search?q=%20%0A", 400, "empty"),
        (f"/api/search?q={'a' * 2001}", 422, "q: "),
        ("/api/search?q=a&k=0", 422, "k: "),
        ("/api/search?q=a&k=101", 422, "k: "),
        ("/api/search?q=a&k=many", 422, "k: "),
        ("/api/search?q=a&index=other", 404, "films"),
        ("/api/search?q=a&since=yesterday", 400, "since"),
        ("/api/search?q=a&until=2026-02-30", 400, "until"),
        *((f"/api/search?q=a&since={s}", 400, "since") for s in ("nan", "inf", "1e9", "10000-1-1")),
        ("/api/search?q=a&folder=../x", 400, "folder"),
        ("/api/search?q=a&folder=%00", 400, "folder"),
        ("/api/explain?q=a", 422, "file_id"),
        ("/api/explain?q=&file_id=1", 400, "empty"),
        ("/api/explain?q=a&file_id=99", 404, "not in the index"),
        ("/api/explain?q=a&file_id=1&start=nan", 422, "start"),
        ("/api/explain?q=a&file_id=1&start=-1", 422, "start"),
        ("/api/explain?q=a&file_id=1&end=inf", 422, "end"),
        ("/api/explain?q=a&file_id=1&start=2&end=1", 400, "end"),
        ("/api/explain?q=a&file_id=1&start=50&end=51", 422, "no frame"),
        ("/api/thumbnail/films/99", 404, "not in the index"),
        ("/api/thumbnail/films/9999999999999999999999", 422, "file_id"),
        ("/api/thumbnail/films/1?t=nan", 422, "t: "),
        ("/api/thumbnail/other/1", 404, "films"),
        ("/media/films/99", 404, "not in the index"),
        ("/media/films/a.mp4", 422, "file_id"),
        ("/media/films/../../etc/passwd", 404, ""),
        ("/media/films/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404, ""),
        ("/static/__init__.py", 404, ""),
        ("/static/..%2f__init__.py", 404, ""),
        ("/none", 404, ""),
    ],
)
def test_wrong_questions(client, address, status, said):
    answer = client.get(address)
    assert answer.status_code == status
    (line,) = answer.json().values()
    assert said in line and "\n" not in line and list(answer.json()) == ["error"]


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("content", [b"", b"no video", b"\xff\xd8\xff\xe0" + b"\0" * 99])
def test_uploads_that_are_none(client, temporary, kind, content):
    answer = client.post(f"/api/search/{kind}", files={"file": ("name.x", content)})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("name.x: ")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("charset", ["utf-7", "utf-16", "idna", "undefined", "unicode_escape", ""])
def test_uploads_in_odd_charsets(client, charset):
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="+2AA-\\ud800"\r\n\r\n0'
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    answer = client.post("/api/search/video", content=body + b"\r\n--b--\r\n", headers=headers)
    assert (answer.status_code, answer.json()) == (415, {"error": "charset: must be utf-8"})


def test_uploads_without_a_file(client):
    for given in (
        {"content": gzip.compress(b"0"), "headers": {"Content-Encoding": "gzip"}},
        {"content": b"0", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"0", "headers": {"Content-Type": "multipart/form-data; boundary=" + "b" * 99}},
        {"content": b"--b", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
    ):
        answer = client.post("/api/search/video", **given)
        assert answer.status_code in (400, 422) and list(answer.json()) == ["error"]
    for given in ({}, {"data": {"file": "text"}}, {"files": {"other": b"0"}}, {"content": b"0"}):
        answer = client.post("/api/search/video", **given)
        assert answer.status_code in (400, 422) and list(answer.json()) == ["error"]
    assert client.get("/api/search/video").status_code == 405


def test_a_playlist_is_no_upload(client, films):
    """FFmpeg would open what it names."""
    lists = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{films[0] / 'a.mp4'}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{films[0] / 'a.mp4'}'\n",
    )
    for text in lists:
        answer = client.post("/api/search/video", files={"file": ("a.mp4", text.encode())})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("a.mp4: not readable as video (")


def test_a_long_upload(serve, films):
    client = serve(max_seconds=2.0)
    content = (films[0] / "a.mp4").read_bytes()
    answer = client.post("/api/search/video", files={"file": ("a.mp4", content)})
    assert answer.status_code == 400
    assert answer.json() == {"error": "a.mp4: 3 s long; at most 2 s are taken"}


def test_a_large_picture(client, monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (8000, 8000)).save(buffer, "PNG")
    answer = client.post("/api/search/image", files={"file": ("a.png", buffer.getvalue())})
    assert answer.status_code == 400 and "million pixels" in answer.json()["error"]


def test_a_file_that_vanished(own):
    client, folder, _searcher = own
    assert client.get("/api/thumbnail/own/1").status_code == 200  # and is kept
    (folder / "a.mp4").unlink()
    for address in (
        "/media/own/1",
        "/api/thumbnail/own/1",
        "/api/explain?q=a&file_id=1",
    ):
        answer = client.get(address)
        assert answer.status_code == 404
        assert answer.json() == {"error": "a.mp4: it is not there any more"}
    hits = client.get("/api/search", params={"q": "white"}).json()["hits"]
    assert {hit["name"]: hit["missing"] for hit in hits}["a.mp4"]
    assert sum(hit["missing"] for hit in hits) == 1


def test_a_file_that_became_a_link_to_another(own, tmp_path):
    client, folder, _searcher = own
    shutil.move(folder / "a.mp4", tmp_path / "secret.mp4")
    (folder / "a.mp4").symlink_to(tmp_path / "secret.mp4")
    for address in ("/media/own/1", "/api/thumbnail/own/1", "/api/explain?q=a&file_id=1"):
        answer = client.get(address)
        assert answer.status_code == 404 and "leads out" in answer.json()["error"]


def test_a_file_that_could_not_be_indexed_is_not_handed_out(own, retriever):
    client, folder, searcher = own
    (folder / "secret.mp4").write_text("no video")
    library.make(searcher.index.directory, folder, retriever)
    assert [path for path, _ in searcher.index.failures()] == ["secret.mp4"]
    ids = range(1, 9)
    answers = {client.get(f"/media/own/{i}").status_code for i in ids}
    contents = [client.get(f"/media/own/{i}").content for i in ids]
    assert answers == {200, 404} and b"no video" not in contents


@pytest.mark.parametrize(
    ("how", "said"), [("crash", "its decoder crashed (SIGABRT)"), ("fail", "not decodable")]
)
def test_a_decoder_that_goes_wrong(client, monkeypatch, how, said):
    monkeypatch.setattr("vop_jax.serve.decoders.thumbnail", getattr(treacherous, how))
    monkeypatch.setattr("vop_jax.serve.decoders.uploaded_video", getattr(treacherous, how))
    answer = client.get("/api/thumbnail/films/1")
    assert (answer.status_code, answer.json()) == (422, {"error": f"a.mp4: {said}"})
    answer = client.post("/api/search/video", files={"file": ("f.mp4", b"0")})
    assert (answer.status_code, answer.json()) == (400, {"error": f"f.mp4: {said}"})
    monkeypatch.undo()
    assert client.get("/api/thumbnail/films/1").status_code == 200


def test_what_nobody_foresaw(client, monkeypatch, searcher):
    def fail(*arguments):
        raise RuntimeError("secret /inside/path")

    monkeypatch.setattr(searcher.index, "counts", fail)
    answer = client.get("/api/indexes")
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed; its log says more"}
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_an_index_that_is_gone(own):
    client, _folder, searcher = own
    os.rename(searcher.index.directory, str(searcher.index.directory) + "-away")
    for address in ("/api/search?q=white", "/api/indexes", "/api/thumbnail/own/1", "/media/own/1"):
        answer = client.get(address)
        assert answer.status_code == 503 and "no index" in answer.json()["error"], address


def test_the_others_where_one_index_is_gone(own, serve, searcher):
    _, _, gone = own
    client = serve({"own": gone, "films": searcher})
    assert [about["name"] for about in client.get("/api/indexes").json()] == ["own", "films"]
    os.rename(gone.index.directory, str(gone.index.directory) + "-away")
    assert [about["name"] for about in client.get("/api/indexes").json()] == ["films"]
