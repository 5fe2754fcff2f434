"""Published weights by name, from a folder in the layout of the server."""

import hashlib
import io
import urllib.request

import pytest

from vop_jax.clip.convert import download
from vop_jax.config.clip import PRESETS
from vop_jax.errors import UserError

NAME = "ViT-B/32"
BODY = bytes(range(256)) * 9000  # more than one chunk


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(base URL, the file that it serves): BODY is the published file."""
    digest = hashlib.sha256(BODY).hexdigest()
    monkeypatch.setitem(download.PUBLISHED, NAME, (digest, "ViT-B-32.pt"))
    file = tmp_path / "models" / digest / "ViT-B-32.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(BODY)
    return (tmp_path / "models").as_uri(), file


class Truncated(io.BytesIO):
    headers = {"Content-Length": str(len(BODY))}  # noqa: RUF012


def test_published_names_are_those_of_the_presets():
    assert download.PUBLISHED.keys() == PRESETS.keys() - {"tiny", "small"}


def test_a_good_file_is_cached_and_a_broken_one_replaced(served, tmp_path):
    (url, file), cache = served, tmp_path / "new" / "cache"
    path = download.fetch(NAME, cache, url + "/")
    assert path.read_bytes() == BODY and list(cache.iterdir()) == [path]
    file.unlink()
    assert download.fetch(NAME, cache, url) == path
    file.write_bytes(BODY)
    path.write_bytes(BODY[:-1])
    assert download.fetch(NAME, cache, url).read_bytes() == BODY


def test_anything_else_is_refused_and_not_kept(served, tmp_path, monkeypatch):
    (url, file), cache = served, tmp_path / "cache"

    def refused(message, url=url):
        with pytest.raises(UserError, match=rf"{url}/{file.parent.name}/ViT-B-32\.pt: {message}"):
            download.fetch(NAME, cache, url)
        assert not list(cache.iterdir())

    file.write_bytes(BODY[::-1])
    refused("SHA-256")
    file.unlink()
    refused("cannot be downloaded .*--source=FILE")
    refused("cannot be downloaded", "no-url")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Truncated(BODY[:5000]))
    refused("the download stopped at 5,000 of")
