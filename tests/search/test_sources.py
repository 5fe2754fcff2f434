"""Videos in a bucket, on a web server, by a pattern or a manifest are those of a folder."""

import json
import os

import numpy as np
import pytest

from tests.search import library, web
from tests.video import videos
from vop_jax import UserError
from vop_jax.search import sources
from vop_jax.search.index import Index
from vop_jax.storage import remote

pytest.importorskip("aiohttp", reason="fsspec reads https:// with it")
fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def site(shared):
    with web.serving(shared[0]) as served:
        yield served


@pytest.fixture
def bucket(shared, tmp_path):
    """A folder of an emulated store, in the memory of this process."""
    root = f"memory://{tmp_path.name}"
    system = fsspec.filesystem("memory")
    for path in library.content(shared[1]):
        system.pipe(f"{root}/{path[0]}", (shared[0] / path[0]).read_bytes())
    system.pipe(f"{root}/notes.txt", b"no video")
    system.pipe(f"{root}/.hidden/a.mp4", b"hidden")
    yield root
    system.rm(root, recursive=True)


def as_local(content, prefix=""):
    return {(path.removeprefix(prefix), *rest): v for (path, *rest), v in content.items()}


def test_a_bucket_is_indexed_as_a_folder(bucket, shared, tmp_path, retriever):
    expected = library.content(shared[1])
    index = tmp_path / "index"
    report = library.make(index, bucket, retriever, window=1.0)
    assert (report.added, report.failed) == (4, 0)
    library.assert_same(library.content(index), expected)
    opened = Index(index)
    assert opened.folder == bucket
    assert str(opened.path_of(1)).startswith(f"{bucket}/")
    fsspec.filesystem("memory").rm(f"{bucket}/a.mp4")
    again = library.make(index, "", retriever)
    assert (again.unchanged, again.removed) == (3, 1)

    pattern = tmp_path / "pattern"
    library.make(pattern, f"{bucket}/sub/*.mp4", retriever, window=1.0)
    own = {key: v for key, v in expected.items() if key[0].startswith("sub/")}
    library.assert_same(library.content(pattern), as_local(own, "sub/"))
    local = tmp_path / "local"
    library.make(local, f"{shared[0]}/su*/*.mp4", retriever, window=1.0)
    library.assert_same(library.content(local), own)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_manifest_names_files_anywhere(form, site, shared, tmp_path, retriever):
    names = ["a.mp4", f"{site.address}/c.mp4", str(shared[0] / "sub" / "d.mp4"), "gone.mp4"]
    os.symlink(shared[0] / "a.mp4", tmp_path / "a.mp4")
    manifest = tmp_path / f"list.{form}"
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"video": names, "other": [1] * 4}), manifest)
    elif form == "csv":
        manifest.write_text("other,video\n" + "".join(f"1,{name}\n" for name in names))
    else:
        manifest.write_text("".join(json.dumps({"video": name}) + "\n" for name in names))
    index = tmp_path / "index"
    report = library.make(index, manifest, retriever, window=1.0)
    assert (report.added, report.skipped) == (3, {"gone.mp4": "no such file"})
    expected = library.content(shared[1])
    found = library.content(index)
    for name, local in zip(names, ("a.mp4", "c.mp4", "sub/d.mp4"), strict=False):
        own = {key[1:]: v for key, v in found.items() if key[0] == name}
        library.assert_same(own, {key[1:]: v for key, v in expected.items() if key[0] == local})


def test_only_the_ranges_that_are_needed_are_read(tmp_path, retriever, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    noise = np.random.default_rng(0).integers(0, 255, (300, 96, 96, 3), np.uint8)
    path = tmp_path / "long.mp4"
    videos.encode(path, noise, rate=10, options={"g": "10"})
    with web.serving(tmp_path) as site:
        clip = retriever.sample(f"{site.address}/long.mp4", 15.0, 16.0)
        sent = site.sent
    expected = retriever.sample(path, 15.0, 16.0)
    np.testing.assert_array_equal(np.stack(clip.pixels), np.stack(expected.pixels))
    assert sent < path.stat().st_size / 2


def test_a_store_that_fails_for_a_moment_is_asked_again(site, shared, retriever, monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    expected = retriever.embed_videos([shared[0] / "a.mp4"])
    site.failures = 2
    found = retriever.embed_videos([f"{site.address}/a.mp4"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    site.failures = 1000
    with pytest.raises(UserError, match=r"a\.mp4: cannot be opened \(the store fails: .*503"):
        retriever.embed_videos([f"{site.address}/a.mp4"])
    site.failures = 0
    with pytest.raises(UserError, match=r"nothing\.mp4: no such file"):
        retriever.embed_videos([f"{site.address}/nothing.mp4"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "video\na.mp4\nb.mp4\na.mp4\n", ":4: a.mp4 is listed twice, first in 2"),
        ("a.csv", "name\na.mp4\n", ":2: no video; each row names one"),
        ("a.csv", "video\n", ": names no videos"),
        ("a.jsonl", "[1]\n", ":1: not a JSON object"),
        ("a.jsonl", b"\xff\xfe", ": not text in UTF-8"),
        ("a.parquet", "junk", ": not readable as Parquet"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        sources.find(str(path))
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere.csv", "no such folder or file"),
        ("memory://nowhere", "no such folder or file|no videos there"),
        ("memory://nowhere/*.mp4", "no videos there"),
        ("https://host/folder", "a web server lists no folders"),
        ("rtsp://host/a", "an address .rtsp://., not a file"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        sources.find(source)
