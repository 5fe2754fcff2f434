"""Places for vectors: a folder, Milvus Lite, a Milvus server."""

import importlib.util
import shutil
import socket
import sys

import pytest

from tests import processes

# Milvus with all its parts in one process. Prints the port once that answers.
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


@pytest.fixture(
    scope="session", params=["folder", "lite", pytest.param("server", marks=pytest.mark.slow)]
)
def place(request, tmp_path_factory):
    """An empty text for the folder of an index, "lite", or the address of a server."""
    if request.param == "folder":
        yield ""
        return
    for module in ("pymilvus", "milvus_lite"):
        pytest.importorskip(module, reason="pip install '.[milvus]'")
    if request.param == "lite":
        yield "lite"
        return
    if importlib.util.find_spec("milvus") is None:
        pytest.skip("needs a Milvus server: pip install milvus")
    folder = tmp_path_factory.mktemp("milvus")
    ports = [str(free_port()) for _ in range(20)]
    server = processes.Process([sys.executable, "-c", SERVER, folder, *ports])
    yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    server.end()
    shutil.rmtree(folder)  # 400 MB of programs


@pytest.fixture
def uri(place, tmp_path):
    """A new store in this place; an empty text for the folder of an index."""
    return {"": "", "lite": str(tmp_path / "a.db")}.get(place, f"{place}#{tmp_path.name}")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
