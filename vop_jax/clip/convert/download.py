"""OpenAI's published weights by name: downloaded once, checked, and cached."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from vop_jax.errors import UserError
from vop_jax.storage.files import StrPath, sha256

BASE_URL = "https://openaipublic.azureedge.net/clip/models"
CACHE = "~/.cache/vop_jax"
# SHA-256, which is also the server's folder, and file.
PUBLISHED = {
    "ViT-B/32": (
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "ViT-B-32.pt",
    ),
    "ViT-B/16": (
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        "ViT-B-16.pt",
    ),
    "ViT-L/14": (
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "ViT-L-14.pt",
    ),
    "ViT-L/14@336px": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "ViT-L-14-336px.pt",
    ),
}
_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


def fetch(name: str, cache: StrPath = CACHE, base_url: str = BASE_URL) -> Path:
    """Returns the file of a published CLIP from the cache; downloads it if it is not there.

    Args:
        name: one of `PUBLISHED`.
        base_url: a mirror laid out as `<base_url>/<sha256>/<file>`.

    Raises:
        UserError: the download fails, or the file is not the published one; it is deleted.
    """
    digest, file_name = PUBLISHED[name]
    target = Path(cache).expanduser() / file_name
    if target.is_file() and sha256(target) == digest:
        return target
    url = f"{base_url.rstrip('/')}/{digest}/{file_name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{file_name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            _download(url, file)
        if (actual := sha256(partial)) != digest:
            raise UserError(f"{url}: SHA-256 is {actual}, not the published one; file deleted")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _download(url: str, file: BinaryIO) -> None:
    from tqdm import tqdm

    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=url) as bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise UserError(
            f"{url}: cannot be downloaded ({error}); --source=FILE converts a file that you have"
        ) from None
    if size and file.tell() != size:
        raise UserError(f"{url}: the download stopped at {file.tell():,} of {size:,} bytes")
