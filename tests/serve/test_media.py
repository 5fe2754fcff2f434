"""Only indexed files inside the folder are opened, whoever swaps them; how they are sent."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.search import library
from tests.video import videos
from vop_jax.search.catalog import IndexedFile
from vop_jax.search.searcher import open_searcher
from vop_jax.serve.media import FileGone, open_indexed, open_inside, path_of

OLD = "Sat, 01 Jan 2000 00:00:00 GMT"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films" / "sub").mkdir(parents=True)
    (tmp_path / "films" / "sub" / "a.mp4").write_bytes(b"a film")
    (tmp_path / "secret").write_bytes(b"a secret")
    return tmp_path / "films"


@pytest.mark.parametrize("path", ["films/sub/a.mp4", "films/b.mp4", "films/up/a.mp4", "link/b.mp4"])
def test_files_and_links_inside_the_folder_are_opened_and_stay_themselves(folder, path):
    (folder / "b.mp4").symlink_to("sub/a.mp4")
    (folder / "up").symlink_to("sub")
    (folder.parent / "link").symlink_to(folder)
    root, _, name = path.partition("/")
    with open_inside(folder.parent / root, name) as file:
        (folder / "sub" / "a.mp4").unlink()
        (folder / "sub" / "a.mp4").symlink_to(folder.parent / "secret")
        with open(path_of(file), "rb") as again:
            assert again.read() == b"a film"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *((path, "leads out") for path in ("../secret", "sub/../../secret", "/etc/passwd", "")),
        *((path, "leads out") for path in ("out.mp4", "up/secret", ".")),
        ("sub/b.mp4", "not there"),
        *((path, "no file") for path in ("sub", "pipe.mp4")),
    ],
)
def test_other_paths_are_refused(folder, path, reason):
    (folder / "out.mp4").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(FileGone, match=reason):
        open_inside(folder, path)


def test_a_link_that_appears_while_a_file_is_opened_is_not_followed(folder, monkeypatch):
    real = os.path.realpath

    def swap(path, **options):
        resolved = real(path, **options)
        if str(path).endswith("a.mp4"):
            os.unlink(path)
            os.symlink(folder.parent / "secret", path)
        return resolved

    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises(FileGone, match="not there"):
        open_inside(folder, "sub/a.mp4")


def test_a_file_that_was_replaced_after_indexing_is_refused(folder):
    film = folder / "sub" / "a.mp4"
    state = film.stat()
    record = IndexedFile(1, "sub/a.mp4", state.st_size, state.st_mtime_ns, None, None)
    with open_indexed(folder, record) as file:
        assert file.read() == b"a film"
    (film.parent / "notes.txt").write_bytes(b"my notes")

    def link():
        film.unlink()
        film.symlink_to("notes.txt")

    descriptors = len(os.listdir("/dev/fd"))
    for change in (lambda: film.write_bytes(b"A FILM"), link):
        change()
        with pytest.raises(FileGone, match="changed since it was indexed"):
            open_indexed(folder, record)
    assert len(os.listdir("/dev/fd")) == descriptors


# ---- Over HTTP


def picture_of(response):
    assert response.headers["content-type"] == "image/jpeg"
    return Image.open(io.BytesIO(response.content))


def test_thumbnails_show_the_video_at_a_time(client):
    answers = [client.get("/api/thumbnail/films/1", params={"t": t}) for t in (0, 1, 2.9, 99)]
    levels = [videos.level_of(np.asarray(picture_of(r).convert("RGB"))) for r in answers]
    assert levels[0] < levels[1] < levels[2] == levels[3]


def test_media_are_sent_whole_and_in_ranges(client, films):
    content = (films[0] / "a.mp4").read_bytes()
    whole = client.get("/media/films/1")
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["content-type"] == "video/mp4"
    for span, part in [("0-9", content[:10]), ("10-", content[10:]), ("-7", content[-7:])]:
        response = client.get("/media/films/1", headers={"Range": f"bytes={span}"})
        assert (response.status_code, response.content) == (206, part)
    outside = f"bytes={len(content)}-", "bytes=-0", f"bytes=0-1,{10**30}-"
    invalid = "bytes=5-2", "bytes=a-b", "lines=1-2"
    for span, status in [*((s, 416) for s in outside), *((s, 400) for s in invalid)]:
        wrong = client.get("/media/films/1", headers={"Range": span})
        assert wrong.status_code == status and list(wrong.json()) == ["error"]
        assert (wrong.headers.get("content-range") == f"bytes */{len(content)}") == (status == 416)
    wrong = client.get("/static/page.js", headers={"Range": "bytes=9-1"})
    assert wrong.status_code == 400 and list(wrong.json()) == ["error"]
    for condition, status in [(whole.headers["etag"], 206), ('"other"', 200), ("W/1", 200)]:
        headers = {"Range": "bytes=0-9", "If-Range": condition}
        assert client.get("/media/films/1", headers=headers).status_code == status


def test_a_client_is_not_sent_what_it_has(client):
    for address in ("/", "/static/page.js", "/media/films/1", "/api/thumbnail/films/1"):
        first = client.get(address)
        tag, date = first.headers["etag"], first.headers["last-modified"]
        for name, value, status in [
            *(("If-None-Match", value, 304) for value in (tag, f'"other", W/{tag}')),
            *(("If-Modified-Since", value, 200) for value in ("yesterday", OLD)),
            ("If-None-Match", '"other"', 200),
            ("If-Modified-Since", date, 304),
        ]:
            response = client.get(address, headers={name: value})
            assert response.status_code == status, (address, name, value)
            assert response.content == (b"" if status == 304 else first.content)
            assert response.headers["etag"] == tag


@pytest.fixture(scope="module")
def changed(films, retriever, serve, tmp_path_factory):
    """(client, {name: file id}, searcher) of a folder whose files changed after indexing.

    The folder's name is not UTF-8.
    """
    root = tmp_path_factory.mktemp("changed")
    folder = root / os.fsdecode(b"films \xff\x1b[2J")
    library.copy(films[0], folder)
    videos.write(folder / "large.mp4", 10, width=640, height=480)
    (folder / "secret.mp4").write_text("no video")
    library.make(root / "index", folder, retriever)
    searcher = open_searcher(root / "index", retriever=retriever)
    assert [path for path, _ in searcher.index.failures()] == ["secret.mp4"]
    client = serve({"own": searcher, "films": open_searcher(films[1], retriever=retriever)})
    hits = client.get("/api/search?q=white&k=99").json()["hits"]
    assert len(hits) == 5 and not any(hit["missing"] for hit in hits)
    ids = {hit["name"]: hit["file_id"] for hit in hits}
    assert client.get(f"/api/thumbnail/own/{ids['a.mp4']}").status_code == 200  # and cached
    (folder / "a.mp4").unlink()
    shutil.move(folder / "sub" / "b.mp4", root / "outside.mp4")
    (folder / "sub" / "b.mp4").symlink_to(root / "outside.mp4")
    videos.write(folder / "c.mp4", 12, width=32, height=32)
    return client, ids, searcher


def test_files_that_changed_after_indexing_are_not_sent(changed):
    client, ids, _ = changed
    for name, reason in (
        ("a.mp4", "it is not there any more"),
        ("sub/b.mp4", "it leads out of the indexed folder"),
        ("c.mp4", "it has changed since it was indexed; index again"),
    ):
        for address in (
            f"/media/own/{ids[name]}",
            f"/api/thumbnail/own/{ids[name]}",
            f"/api/explain?q=a&file_id={ids[name]}",
        ):
            response = client.get(address)
            assert response.status_code == 404, address
            assert response.json() == {"error": f"{name}: {reason}"}
    hits = client.get("/api/search", params={"q": "white", "k": 99}).json()["hits"]
    assert {hit["name"] for hit in hits if hit["missing"]} == {"a.mp4"}
    others = set(range(1, 9)) - {*ids.values()}  # one of them is secret.mp4
    assert {client.get(f"/media/own/{i}").status_code for i in others} == {404}


def test_a_thumbnail_is_small_and_made_once(changed, monkeypatch):
    client, ids, _ = changed
    (about, _) = client.get("/api/indexes").json()
    assert about["folder"].endswith("films \ufffd\x1b[2J") and about["files"] == 5
    address = f"/api/thumbnail/own/{ids['large.mp4']}"
    first = client.get(address)
    assert picture_of(first).size == (320, 240)
    monkeypatch.setattr("vop_jax.serve.executor.Executor.decode", None)
    assert client.get(address).content == first.content


def test_an_index_that_is_gone_is_reported_and_the_others_are_served(changed, serve):
    client, _, searcher = changed
    alone = serve({"own": searcher})
    directory = searcher.index.directory
    assert [about["name"] for about in client.get("/api/indexes").json()] == ["own", "films"]
    os.rename(directory, f"{directory}-away")
    try:
        assert [about["name"] for about in client.get("/api/indexes").json()] == ["films"]
        for address in ("search?q=white", "indexes", "thumbnail/own/1", "../media/own/1"):
            response = alone.get(f"/api/{address}")
            assert response.status_code == 503 and "no index" in response.json()["error"], address
    finally:
        os.rename(f"{directory}-away", directory)
