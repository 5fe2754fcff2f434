"""What the server answers to right and wrong requests."""

import csv
import gzip
import io
import os
import tempfile

import pytest
from PIL import Image

from tests.serve import treacherous
from vop_jax.search.query import Hit
from vop_jax.serve.api import search_hit
from vop_jax.serve.media import VideoResponse
from vop_jax.serve.middleware import error_response


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """The folder of uploaded files, which must be empty in the end."""
    (tmp_path / "uploads").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "uploads"))
    yield
    assert not list((tmp_path / "uploads").iterdir())


def listed(response):
    hits = response.json()["hits"]
    return [(hit["name"], hit["score"], hit["start"], hit["end"]) for hit in hits]


def expected(hits):
    return [(hit.path, pytest.approx(hit.score, abs=1e-5), hit.start, hit.end) for hit in hits]


def test_indexes_are_described(client, films, searcher):
    (about,) = client.get("/api/indexes").json()
    assert about.pop("clip")
    counts = searcher.index.counts()
    assert counts["captions"] == 2 and counts.pop("failed") == 0
    facts = {"name": "films", "method": "zero_shot", "folder": str(films[0]), "frames": 3}
    assert about == counts | facts


def test_a_text_finds_what_the_searcher_finds(client, searcher):
    response = client.get("/api/search", params={"q": "white", "index": "films", "k": 2})
    hits = searcher.text("white", 2)
    assert listed(response) == expected(hits)
    body = response.json()
    assert (body["query"], body["cut"]) == ("white", False)
    first = body["hits"][0]
    assert first["file_id"] == hits[0].file_id
    assert (first["caption"], first["missing"]) == ("", False)
    assert client.get("/api/search", params={"q": "word " * 300}).json()["cut"]


def test_many_texts_in_one_request(client, searcher):
    texts = ["white", "grey becomes white", "white", "word " * 300]
    response = client.post("/api/search/texts", params={"k": 2}, json={"queries": texts})
    found = response.json()
    assert [(row["query"], row["cut"], row["found"]) for row in found] == [
        *((text, False, True) for text in texts[:3]),
        (texts[3], True, True),
    ]
    for row, hits in zip(found, searcher.texts(texts, 2), strict=True):
        assert [hit["name"] for hit in row["hits"]] == [hit.path for hit in hits]
    response = client.post("/api/search/texts?folder=none", json={"queries": ["white"]})
    assert response.json() == [{"query": "white", "cut": False, "found": False, "hits": []}]


def test_a_minimum_score(client, searcher):
    hits = searcher.text("white", 4)
    for minimum, count in (("auto", 4), ("none", 4), (hits[1].score - 1e-6, 2), (1, 0)):
        request = {"q": "white", "k": 4, "min_score": minimum}
        body = client.get("/api/search", params=request).json()
        assert (len(body["hits"]), body["found"]) == (count, count > 0)


def test_results_as_files(client, searcher, films):
    hits = searcher.text("white", 2)
    request = {"q": "white", "k": 2, "format": "csv"}
    response = client.get("/api/search", params=request)
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert response.headers["content-disposition"] == "attachment; filename=search.csv"
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert [row["path"] for row in rows] == [str(films[0] / hit.path) for hit in hits]
    texts = {"queries": ["white", "grey"]}
    rows = client.post("/api/search/texts?format=csv&k=2", json=texts).text.splitlines()
    assert [row.split(",")[0] for row in rows] == ["query", "white", "white", "grey", "grey"]
    otio = pytest.importorskip("opentimelineio", reason="needs the extra otio")
    response = client.get("/api/search", params={**request, "format": "otio"})
    (track,) = otio.adapters.read_from_string(response.text, "otio_json").tracks
    assert [clip.media_reference.target_url for clip in track] == [
        (films[0] / hit.path).as_uri() for hit in hits
    ]
    assert {clip.source_range.duration.rate for clip in track} == {10.0}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"queries": []}, 422, "queries: "),
        ({"queries": ["a"] * 101}, 422, "queries: "),
        ({"queries": ["a", " "]}, 400, "empty"),
        ({"queries": ["a" * 2001]}, 422, "queries.0: "),
        ({"queries": "a"}, 422, "queries: "),
        ("a", 422, "body: "),
        ({"queries": ["a" * (2 << 20)]}, 413, "larger than the 1 MB"),
    ],
)
def test_wrong_texts_get_one_line(client, body, status, message):
    response = client.post("/api/search/texts", json=body)
    assert response.status_code == status and message in response.json()["error"]


def test_filters_narrow_a_search(client, searcher):
    every = {"since": "0001-01-01", "until": "9999-12-31T23"}, {"folder": "", "since": ""}
    for filters in (*every, {"folder": "sub"}, {"since": "2023-11-16"}, {"until": "2023-11-15"}):
        response = client.get("/api/search", params={"q": "white", **filters})
        hits = searcher.text("white", **{k: v for k, v in filters.items() if v})
        assert listed(response) == expected(hits)
        assert len(hits) == 4 if filters in every else 0 < len(hits) < 4


def test_a_video_and_a_picture_find_what_the_searcher_finds(
    client, films, searcher, uploads, tmp_path
):
    film = films[0] / "a.mp4"
    for to in ("videos", "captions"):
        with open(film, "rb") as file:
            parameters = {"to": to, "k": 2}
            response = client.post("/api/search/video", params=parameters, files={"file": file})
        hits = searcher.video(film, 2, to=to)
        assert [hit["name"] for hit in response.json()["hits"]] == [hit.path for hit in hits]
    assert response.json()["query"] == "a.mp4"
    captions = {(hit["caption"], hit["end"]) for hit in response.json()["hits"]}
    assert captions == {("grey becomes white", None), ("another film", None)}
    picture = tmp_path / "a.png"
    Image.new("RGB", (60, 40), "grey").save(picture)
    upload = {"file": picture.read_bytes()}
    response = client.post("/api/search/image", params={"k": 3}, files=upload)
    assert listed(response) == expected(searcher.image(picture, 3))


def test_results_of_an_upload_as_files(client, films, uploads):
    def send(**request):
        with open(films[0] / "a.mp4", "rb") as file:
            return client.post("/api/search/video", params=request, files={"file": file})

    lines = send(format="csv", to="captions").text.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"a.mp4,{films[0]}/") for line in lines[1:])
    assert lines[1].split(",")[4] == ""  # a caption of a whole video
    response = send(format="otio", to="captions")
    assert (response.status_code, "not with to=captions" in response.text) == (400, True)


def test_explain_scores_each_frame_of_a_moment(client, searcher):
    hit = searcher.text("white", 1)[0]
    parameters = {"q": "white", "file_id": hit.file_id, "start": hit.start, "end": hit.end}
    body = client.get("/api/explain", params=parameters).json()
    seconds, scores = searcher.explain("white", hit)
    assert body["seconds"] == pytest.approx(seconds)
    assert body["scores"] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize(
    "address",
    [
        *("/", "/docs", "/healthz", "/static/page.js", "/media/films/1", "/api/indexes"),
        *("/api/search?q=a", "/api/explain?q=a&file_id=1", "/api/thumbnail/films/1"),
    ],
)
def test_head_is_answered_as_get_and_other_methods_are_refused(client, address):
    whole, head = client.get(address), client.head(address)
    assert (whole.status_code, head.status_code) == (200, 200)
    assert all(head.headers[k] == whole.headers[k] for k in ("content-length", "content-type"))
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "NONSENSE"):
        response = client.request(method, address)
        assert response.status_code == 405 and list(response.json()) == ["error"], method


def test_names_that_are_not_utf8_are_shown_with_a_sign(films, tmp_path):
    name = os.fsdecode(b"\xff\n.mp4")
    hit = search_hit(str(films[0]), Hit(1, name, 0.5, 0.0, 1.0, "\ud800"))
    assert (hit.name, hit.caption, hit.missing) == ("\ufffd\n.mp4", "\ufffd", True)
    with open(films[0] / "a.mp4", "rb") as file:
        headers = VideoResponse(file, name).headers
    assert headers["content-disposition"] == "inline; filename*=utf-8''%EF%BF%BD%0A.mp4"
    assert error_response(400, name).body == '{"error":"\ufffd .mp4"}'.encode()


def test_the_docs_list_every_path_and_load_nothing_from_elsewhere(client):
    assert client.get("/").headers["content-type"].startswith("text/html")
    for name, kind in [("page.css", "text/css"), ("page.js", "text/javascript")]:
        assert client.get(f"/static/{name}").headers["content-type"].startswith(kind)
    docs = client.get("/docs").text
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in docs
    assert "http" not in docs.lower()


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("/api/search", 422, "q: "),
        ("/api/search?q=%20%0A", 400, "empty"),
        (f"/api/search?q={'a' * 2001}", 422, "q: "),
        *((f"/api/search?q=a&k={k}", 422, "k: ") for k in ("0", "101", "many")),
        ("/api/search?q=a&index=other", 404, "allowed are films"),
        *((f"/api/search?q=a&since={s}", 400, "since") for s in ("yesterday", "nan", "10000-1-1")),
        ("/api/search?q=a&until=2026-02-30", 400, "until"),
        ("/api/search?q=a&format=xml", 422, "format: "),
        ("/api/search?q=a&min_score=nan", 400, "min_score='nan': must be auto, none or a number"),
        *((f"/api/search?q=a&folder={path}", 400, "folder") for path in ("../x", "%00")),
        ("/api/explain?q=a", 422, "file_id"),
        ("/api/explain?q=&file_id=1", 400, "empty"),
        ("/api/explain?q=a&file_id=99", 404, "not in the index"),
        *((f"/api/explain?q=a&file_id=1&start={s}", 422, "start") for s in ("nan", "-1")),
        ("/api/explain?q=a&file_id=1&end=inf", 422, "end"),
        ("/api/explain?q=a&file_id=1&start=2&end=1", 400, "end"),
        ("/api/explain?q=a&file_id=1&start=50&end=51", 422, "no frame"),
        ("/api/thumbnail/films/99", 404, "not in the index"),
        ("/api/thumbnail/films/9999999999999999999999", 422, "file_id"),
        ("/api/thumbnail/films/1?t=nan", 422, "t: "),
        ("/api/thumbnail/other/1", 404, "films"),
        ("/media/films/99", 404, "not in the index"),
        ("/media/films/a.mp4", 422, "file_id"),
        *((f"/media/films/{up}{up}etc/passwd", 404, "") for up in ("../", "%2e%2e%2f")),
        *((f"/static/{path}", 404, "") for path in ("__init__.py", "..%2f__init__.py")),
        ("/none", 404, ""),
    ],
)
def test_wrong_requests_get_one_line(client, address, status, message):
    response = client.get(address)
    assert response.status_code == status
    (line,) = response.json().values()
    assert message in line and "\n" not in line and list(response.json()) == ["error"]


def test_uploads_that_are_no_pictures_or_videos_are_refused(client, films, uploads, monkeypatch):
    film = films[0] / "a.mp4"
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{film}\n#EXT-X-ENDLIST\n"
    large = io.BytesIO()
    Image.new("1", (8000, 8000)).save(large, "PNG")
    damaged = "not readable as video ("
    wrong = b"", b"no video", b"\xff\xd8\xff\xe0" + b"\0" * 99
    for kind, content, message in [
        *((kind, content, "") for kind in ("video", "image") for content in wrong),
        # FFmpeg would open the files that a playlist names.
        ("video", hls.encode(), damaged),
        ("video", f"ffconcat version 1.0\nfile '{film}'\n".encode(), damaged),
        ("image", large.getvalue(), "million pixels"),
    ]:
        response = client.post(f"/api/search/{kind}", files={"file": ("name.x", content)})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error.startswith("name.x: ") and message in error
    monkeypatch.setitem(vars(client.app.state.services), "max_seconds", 2.0)
    long = {"file": ("a.mp4", film.read_bytes())}
    response = client.post("/api/search/video", files=long)
    assert response.status_code == 400
    assert response.json() == {"error": "a.mp4: 3 s long; at most 2 s are allowed"}


def test_malformed_uploads_are_refused(client):
    form = "multipart/form-data"
    for request in (
        *({}, {"data": {"file": "text"}}, {"files": {"other": b"0"}}, {"content": b"0"}),
        {"content": gzip.compress(b"0"), "headers": {"Content-Encoding": "gzip"}},
        {"content": b"0", "headers": {"Content-Type": form}},
        {"content": b"0", "headers": {"Content-Type": f"{form}; boundary=" + "b" * 99}},
        {"content": b"--b", "headers": {"Content-Type": f"{form}; boundary=b"}},
    ):
        response = client.post("/api/search/video", **request)
        assert response.status_code in (400, 422) and list(response.json()) == ["error"]
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="+2AA-\\ud800"\r\n\r\n0'
    for charset in ("utf-7", "utf-16", "idna", "undefined", "unicode_escape", ""):
        headers = {"Content-Type": f"{form}; boundary=b; charset={charset}"}
        content = body + b"\r\n--b--\r\n"
        response = client.post("/api/search/video", content=content, headers=headers)
        assert (response.status_code, response.json()) == (415, {"error": "charset: must be utf-8"})


def test_failures_of_decoders_and_of_the_server_show_nothing_of_its_inside(
    client, monkeypatch, searcher
):
    with monkeypatch.context() as patch:
        patch.setattr("vop_jax.serve.media.thumbnail", treacherous.fail)
        patch.setattr("vop_jax.serve.media.uploaded_video", treacherous.crash)
        response = client.get("/api/thumbnail/films/1?t=0.33")
        assert (response.status_code, response.json()) == (422, {"error": "a.mp4: not decodable"})
        response = client.post("/api/search/video", files={"file": ("f.mp4", b"0")})
        line = "f.mp4: its decoder crashed (SIGABRT)"
        assert (response.status_code, response.json()) == (400, {"error": line})
    assert client.get("/api/thumbnail/films/1?t=0.33").status_code == 200
    monkeypatch.setattr(searcher.index, "counts", treacherous.fail)
    response = client.get("/api/indexes")
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed; its log says more"}
    assert response.headers["x-content-type-options"] == "nosniff"
