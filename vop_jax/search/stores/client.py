"""A client of Milvus: its address, its time limits, and its errors as one line.

FILE.db, milvus-lite:FILE      Milvus Lite, in this process; one process at a time
http(s)://HOST:PORT            a server; the environment variable MILVUS_TOKEN has its token
either with #NAME at the end   another collection than "vop_jax"
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from vop_jax.errors import UserError

COLLECTION = "vop_jax"
CONNECT, ANSWER, LOAD = 5.0, 20.0, 120.0  # seconds to wait for a server
MOST = 16_384  # results of one search: Milvus' own limit
ROWS = 4096  # in one message: 8 MB of 512 floats
LISTED = 10_000  # ids in one filter; fewer than MOST


def is_server(uri: str) -> bool:
    """Whether a store is a server, which has a place for a whole index."""
    return uri.startswith(("http://", "https://"))


def split(uri: str) -> tuple[str, str]:
    """(address, name of the collection)."""
    address, _, collection = uri.partition("#")
    return address, collection or COLLECTION


def connect(uri: str, *, write: bool) -> Any:
    """A `MilvusClient` of a store.

    Raises:
        UserError: a package is missing; nothing answers there; Milvus Lite cannot open the folder.
    """
    address, _ = split(uri)
    client_class, token = _import_client(), os.environ.get("MILVUS_TOKEN", "")
    if "://" not in address:
        path = os.path.abspath(address.removeprefix("milvus-lite:"))
        address, token = _start_lite(uri, path, write=write), ""
    with milvus_errors(uri):
        return client_class(uri=address, token=token, timeout=CONNECT, dedicated=True)


@contextlib.contextmanager
def milvus_errors(uri: str) -> Iterator[None]:
    """Turns the errors of Milvus into one line that names the store."""
    from grpc import RpcError
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, RpcError, ValueError) as error:
        reason = getattr(error, "message", "") or str(error)
        raise UserError(f"store {uri}: {' '.join(reason.split())[:300]}") from None


def _import_client() -> Any:
    """`MilvusClient`, without its logs: its errors say the same."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pymilvus import MilvusClient
    except ImportError as error:
        raise UserError(f'Milvus: {error}; pip install -e ".[milvus]"') from None
    for name in ("pymilvus", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return MilvusClient


def _start_lite(name: str, path: str, *, write: bool) -> str:
    """The address of Milvus Lite over a folder; it runs until this process ends.

    Raises:
        UserError: no folder to read, a file of that name, another process has it open.
    """
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise UserError(f'Milvus Lite: {error}; pip install -e ".[milvus]"') from None
    if os.path.isfile(path):
        raise UserError(f"store {name}: is a file; Milvus Lite 3 keeps a folder of that name")
    if not write and not os.path.isdir(path):
        raise UserError(f"store {name}: no vector store")
    address = server_manager_instance.start_and_get_uri(path)
    if address is None:
        raise UserError(f"store {name}: Milvus Lite cannot open it; only one process at a time may")
    return address
