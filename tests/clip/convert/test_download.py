"""Published weights by name, from a server on this machine."""

import hashlib
import socket

import pytest

from tests.server import serving
from vop_jax.clip.convert import download
from vop_jax.config.clip import PRESETS
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
    assert download.PUBLISHED.keys() == PRESETS.keys() - {"tiny", "small"}


def test_a_good_file_is_cached_and_a_broken_one_replaced(digest, tmp_path):
    cache = tmp_path / "new" / "cache"
    with serving(BODY) as (url, requested):
        path = download.fetch(NAME, cache, url + "/")
        assert path.read_bytes() == BODY and list(cache.iterdir()) == [path]
        assert download.fetch(NAME, cache, url) == path
        assert requested == [f"/models/{digest}/ViT-B-32.pt"]
        path.write_bytes(BODY[:-1])
        assert download.fetch(NAME, cache, url).read_bytes() == BODY
    assert len(requested) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"body": BODY[::-1]}, "SHA-256"),
        ({"body": b"<html>", "status": 404}, "404"),
        ({"body": BODY[:5000], "length": len(BODY)}, "stopped at 5,000 of"),
    ],
    ids=["wrong", "404", "truncated"],
)
def test_any_other_answer_is_refused_and_not_kept(answer, message, digest, tmp_path):
    with (
        serving(**answer) as (url, _),
        pytest.raises(UserError, match=rf"{url}/{digest}/ViT-B-32\.pt: .*{message}"),
    ):
        download.fetch(NAME, tmp_path, url)
    assert not list(tmp_path.iterdir())


def test_no_server(digest, tmp_path):
    with socket.socket() as bound:  # it does not listen, so it refuses connections
        bound.bind(("127.0.0.1", 0))
        for url in (f"http://127.0.0.1:{bound.getsockname()[1]}", "no-url"):
            with pytest.raises(UserError, match=r"cannot be downloaded .*--source=FILE"):
                download.fetch(NAME, tmp_path, url)
    assert not list(tmp_path.iterdir())
