"""Published weights by name, from a server on this machine."""

import hashlib
import socket

import pytest

from tests.server import serving
from vop_jax.clip.convert import download
from vop_jax.errors import UserError

NAME = "ViT-B/32"
BODY = bytes(range(256)) * 9000  # more than one chunk


@pytest.fixture
def digest(monkeypatch):
    """BODY is the published file."""
    value = hashlib.sha256(BODY).hexdigest()
    monkeypatch.setitem(download.PUBLISHED, NAME, (value, "ViT-B-32.pt"))
    return value


def test_published_names_are_those_of_the_presets():
    from vop_jax.config.clip import PRESETS

    assert download.PUBLISHED.keys() == PRESETS.keys() - {"tiny", "small"}
    assert len({digest for digest, _ in download.PUBLISHED.values()}) == 4


def test_a_good_file_is_kept_and_not_asked_for_again(digest, tmp_path):
    cache = tmp_path / "new" / "cache"
    with serving(BODY) as (url, requested):
        path = download.fetch(NAME, cache, url + "/", progress=False)
        assert download.fetch(NAME, cache, url, progress=False) == path
    assert requested == [f"/models/{digest}/ViT-B-32.pt"]
    assert path.read_bytes() == BODY
    assert list(cache.iterdir()) == [path]


def test_a_broken_file_in_the_cache_is_replaced(digest, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(BODY[:-1])
    with serving(BODY) as (url, requested):
        assert download.fetch(NAME, tmp_path, url, progress=False).read_bytes() == BODY
    assert len(requested) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"body": BODY[::-1]}, "SHA-256"),
        ({"body": b"<html>", "status": 404}, "404"),
        ({"body": BODY[:5000], "length": len(BODY)}, "stopped at 5,000 of"),
    ],
    ids=["wrong", "404", "truncated"],
)
def test_anything_else_is_refused_and_not_kept(answer, reason, digest, tmp_path):
    with (
        serving(**answer) as (url, _),
        pytest.raises(UserError, match=rf"{url}/{digest}/ViT-B-32\.pt: .*{reason}"),
    ):
        download.fetch(NAME, tmp_path, url, progress=False)
    assert not list(tmp_path.iterdir())


def test_no_server(digest, tmp_path):
    with socket.socket() as taken:  # bound, not listening: refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=r"cannot be downloaded .*--source=FILE"):
            download.fetch(NAME, tmp_path, url, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_url_that_is_none(digest, tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        download.fetch(NAME, tmp_path, "no-url", progress=False)
