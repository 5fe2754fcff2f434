"""A folder of videos; and scenic itself, which requirements-scenic.txt installs."""

import importlib.util
import warnings

import jax
import pytest

from tests import runs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return runs.write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def real_scenic():
    """Skips without scenic; scenic and TensorFlow warn, and add arrays of different ranks."""
    if not (importlib.util.find_spec("scenic") and importlib.util.find_spec("scenic.app")):
        pytest.skip("no scenic: see requirements-scenic.txt")
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        yield
