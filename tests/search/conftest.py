"""Fixtures of the search's tests."""

import shutil

import pytest

import vop_jax
from tests import runs
from tests.search import library, milvus_server


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return runs.write_clip(tmp_path_factory.mktemp("search_clip") / "clip.safetensors")


@pytest.fixture(scope="session")
def retriever(clip):
    return vop_jax.load(clip, frames=3, devices=1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, retriever, clip):
    """(folder, index with moments and captions); read only."""
    root = tmp_path_factory.mktemp("shared")
    return library.make_with_captions(root, retriever, clip=str(clip))


@pytest.fixture
def copied(shared, tmp_path):
    """(folder, read only; a copy of its index)."""
    return shared[0], library.copy(shared[1], tmp_path / "index")


@pytest.fixture(scope="session")
def milvus(tmp_path_factory):
    """The address of a Milvus server."""
    folder = tmp_path_factory.mktemp("milvus")
    with milvus_server.running(folder) as address:
        yield address
    shutil.rmtree(folder)  # 400 MB of programs
