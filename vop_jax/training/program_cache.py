"""Compiled programs in files, so that the next process need not compile them."""

import functools
import hashlib
import os
import pathlib
import pickle
import platform
from collections.abc import Callable, Hashable
from typing import Any

import flax
import jax
from absl import logging
from etils import epath
from jax.experimental import serialize_executable

from vop_jax.storage import files

_hits: list[str] = []  # programs that jax has read from its own cache


def _listen(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _hits.append(event)


jax.monitoring.register_event_listener(_listen)


def set_up(cache: str, workdir: files.StrPath, platform: str) -> None:
    """Keeps programs that took a second or more to compile, for the next start.

    Args:
        cache: the config's `compute.cache`.
        platform: of the devices.
    """
    if cache == "off":
        jax.config.update("jax_compilation_cache_dir", None)
    elif cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    elif not jax.config.values["jax_compilation_cache_dir"]:
        # A CPU's programs may use instructions that the workdir's next machine does not have.
        folder = user_folder() if platform == "cpu" else epath.Path(workdir) / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def user_folder() -> pathlib.Path:
    """The user's folder of programs for this machine.

    XLA compiles for the instructions and the number of the CPU's cores, so another kind of CPU has
    another folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache, "vop_jax", "compiled", _machine())


@functools.cache
def _machine() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags", "Features")
        cpu = sorted({line for line in lines if line.startswith(names)})
    except OSError:  # not Linux
        cpu = [platform.machine(), platform.processor()]
    return _digest(cpu, os.cpu_count(), jax.lib.__version__)


@functools.cache
def _code() -> str:
    """A hash of this package's modules, which are traced into programs."""
    modules = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    return _digest(*(module.read_bytes() for module in modules))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def load_or_compile(
    key: Hashable, devices: list[jax.Device], lower: Callable[[], Any]
) -> jax.stages.Compiled:
    """A compiled program, from its file if there is one.

    Unlike jax's own cache, a file also saves tracing and lowering. It is in
    JAX_COMPILATION_CACHE_DIR if that is a folder of this machine, else in `user_folder`.

    Args:
        key: all that the program depends on, but for code, versions, devices and options of jax.
        devices: that run it.
        lower: traces the program.
    """
    config = jax.config.values
    if not config["jax_enable_compilation_cache"]:
        return lower().compile()
    options = [config[name] for name in ("jax_enable_x64", "jax_default_matmul_precision")]
    options += [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    used = [(device.id, device.device_kind) for device in devices]
    versions = jax.__version__, flax.__version__
    name = _digest(key, used, options, _code(), versions, _machine())
    folder = config["jax_compilation_cache_dir"]
    if not folder or files.is_remote(folder):
        folder = user_folder()
    path = pathlib.Path(folder, f"{name}.program")
    try:
        program, inputs, outputs = pickle.loads(path.read_bytes())
        return serialize_executable.deserialize_and_load(
            program, inputs, outputs, execution_devices=devices
        )
    except FileNotFoundError:
        pass
    except Exception as error:  # jax raises almost anything about a damaged file
        logging.info("%s: not readable (%s); compiles the program", path, error)
    lowered, hits = lower(), len(_hits)
    compiled = lowered.compile()
    if len(_hits) > hits:  # XLA on a CPU cannot write a program that it has read
        return compiled
    try:
        files.write_atomic(path, pickle.dumps(serialize_executable.serialize(compiled)))
    except Exception as error:  # no room, a folder of another user, a backend that cannot
        logging.info("%s: not written (%s)", path, error)
    return compiled
