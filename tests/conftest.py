"""A strict process: eight fake devices, no implicit promotion, exact matmuls, quick to compile."""

import os
import signal
import tempfile

from tests import xla
from tests.processes import ended_processes, pytest_configure  # noqa: F401  for all tests

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(8)}"

import hypothesis
import jax
import pytest
from absl import logging

# A busy machine is no fault of a test.
_slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=_slow)
hypothesis.settings.load_profile("tests")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Runs of the same model in different workdirs compile the same programs, which all workers of
# pytest-xdist share: the first process makes the folder. A size makes jax lock its files.
if "VOP_JAX_TESTS_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="vop_jax_tests_")
    os.environ["VOP_JAX_TESTS_CACHE"] = _cache.name
os.environ["XDG_CACHE_HOME"] = os.environ["VOP_JAX_TESTS_CACHE"]  # not the user's, in no process
jax.config.update("jax_compilation_cache_dir", os.environ["VOP_JAX_TESTS_CACHE"])
jax.config.update("jax_compilation_cache_max_size", xla.CACHE_BYTES)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


@pytest.fixture(scope="module")
def quiet():
    """Leaves logging to pytest where a test calls the command line in its process."""
    from vop_jax import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "set_up_logging", lambda: None)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Videos and their captions, see `runs.write_folder`; tests only read them."""
    from tests import runs

    return runs.write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The file of a random CLIP, see `runs.write_clip`."""
    from tests import runs

    return runs.write_clip(tmp_path_factory.mktemp("clip") / "clip.safetensors")


@pytest.fixture
def call(folder, clip, tmp_path, capsys):
    """Calls with overrides; returns (status, stdout, stderr)."""
    from tests import runs

    def call(*overrides, workdir=tmp_path / "run", **replaced):
        places = {"folder": folder, "clip": clip, **replaced}
        argv = runs.arguments(places["folder"], places["clip"], workdir, *overrides)
        status = runs.call(*argv)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture(autouse=True, scope="session")
def float32():
    """`auto` is float32 on every machine, or results would depend on it."""
    from vop_jax.clip.kernels import products

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "fastest_dtype", lambda device: "float32")
        yield


@pytest.fixture(autouse=True)
def process_state():
    """Restores what a command line sets for its process: the level of logs, signal handlers."""
    level = logging.get_verbosity()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    logging.set_verbosity(level)
    for number, handler in handlers.items():
        if handler is not None:  # None: one of C
            signal.signal(number, handler)
