"""scenic itself, for the tests that need it; requirements-scenic.txt installs it."""

import importlib.util
import warnings

import jax
import pytest


@pytest.fixture
def real_scenic():
    """Skips without scenic; scenic and TensorFlow warn, and add arrays of different ranks."""
    if not (importlib.util.find_spec("scenic") and importlib.util.find_spec("scenic.app")):
        pytest.skip("no scenic: see requirements-scenic.txt")
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        yield
