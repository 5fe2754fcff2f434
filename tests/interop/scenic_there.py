"""scenic itself, for the tests that need it; requirements-scenic.txt brings it."""

import importlib.util
import warnings

import jax
import pytest

THERE = importlib.util.find_spec("scenic") and importlib.util.find_spec("scenic.app")
needs_scenic = pytest.mark.skipif(not THERE, reason="no scenic: see requirements-scenic.txt")


@pytest.fixture
def lenient():
    """scenic and TensorFlow warn, and add arrays of different ranks."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        yield
