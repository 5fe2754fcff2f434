"""Places for vectors: a folder, Milvus Lite, a Milvus server."""

import pytest


@pytest.fixture(
    scope="session", params=["folder", "lite", pytest.param("server", marks=pytest.mark.slow)]
)
def place(request):
    """An empty text for the folder of an index, "lite", or the address of a server."""
    if request.param == "folder":
        return ""
    if request.param == "server":
        return request.getfixturevalue("milvus")
    for module in ("pymilvus", "milvus_lite"):
        pytest.importorskip(module, reason="pip install '.[milvus]'")
    return "lite"


@pytest.fixture
def uri(place, tmp_path):
    """A new store in this place; an empty text for the folder of an index."""
    return {"": "", "lite": str(tmp_path / "a.db")}.get(place, f"{place}#{tmp_path.name}")
