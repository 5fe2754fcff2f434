"""Milvus Lite serves a folder inside this process: started once, stopped by its last user."""

import collections
import os
import threading

from vop_jax.errors import UserError

_users: collections.Counter[str] = collections.Counter()  # by path
_lock = threading.Lock()


def start(name: str, path: str, *, write: bool) -> str:
    """The address of Milvus Lite over a folder, started if no other store here uses it.

    Raises:
        UserError: nothing there to read, a file of that name, another process has it open.
    """
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise UserError(f'Milvus Lite: {error}; pip install -e ".[milvus]"') from None
    if os.path.isfile(path):
        raise UserError(f"store {name}: is a file; Milvus Lite 3 keeps a folder of that name")
    if not write and not os.path.isdir(path):
        raise UserError(f"store {name}: no vector store")
    with _lock:
        address = server_manager_instance.start_and_get_uri(path)
        if address is None:
            raise UserError(
                f"store {name}: Milvus Lite cannot open it; only one process at a time may"
            )
        _users[path] += 1
    return address


def stop(path: str) -> None:
    """One user less of the folder; after the last, another process may open it."""
    from milvus_lite.server_manager import server_manager_instance

    with _lock:
        _users[path] -= 1
        if not _users[path]:
            server_manager_instance.release_server(path)
