"""A Milvus server with all its parts in one process, from the programs of the wheel `milvus`."""

import contextlib
import importlib.util
import os
import socket
import sys
import tempfile

import filelock
import pytest

from tests import processes

# Prints the port once that answers.
SERVER = """
import sys
from milvus import MilvusServer, MilvusServerConfig
config = MilvusServerConfig(data_dir=sys.argv[1])
names = [name for name in config.configurable_items if name.endswith("_port")]
config.update(**dict(zip(names, sys.argv[2:])))
server = MilvusServer(config)
server.webservice_port = int(sys.argv[-1])
server.start()
print(server.listen_port, flush=True)
server.server_proc.wait()
"""


@contextlib.contextmanager
def running(folder):
    """The address of a server with its data in a folder.

    A machine runs one at a time, so another process of the tests waits for its end.
    """
    pytest.importorskip("pymilvus", reason="pip install '.[milvus]'")
    if importlib.util.find_spec("milvus") is None:
        pytest.skip("needs a Milvus server: pip install milvus")
    ports = [str(free_port()) for _ in range(20)]
    with filelock.FileLock(os.path.join(tempfile.gettempdir(), "milvus_of_tests.lock")):
        server = processes.Process([sys.executable, "-c", SERVER, folder, *ports])
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.end()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
