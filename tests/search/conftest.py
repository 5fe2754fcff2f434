"""What most tests of the search begin with."""

import pytest

import vop_jax
from tests import runs
from tests.search import library


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return runs.write_clip(tmp_path_factory.mktemp("search_clip") / "clip.safetensors")


@pytest.fixture(scope="session")
def retriever(clip):
    return vop_jax.load(clip, frames=3, devices=1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, retriever):
    """(folder, index with moments): to be read only."""
    return library.make_with_captions(tmp_path_factory.mktemp("shared"), retriever)
