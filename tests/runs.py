"""A folder of small videos, a CLIP that reads real captions, and the command line on them."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tests import xla
from tests.video import videos
from vop_jax import main
from vop_jax.clip.model import Clip
from vop_jax.clip.weights import save_clip
from vop_jax.config.clip import ClipConfig

ROOT = Path(__file__).parents[1]
CLIP = ClipConfig(16, 8, 32, 2, 2, 16, 2, 2, 24, context_length=24)
TRAIN, TEST = 16, 8


def write_clip(path: Path, seed: int = 0, config: ClipConfig = CLIP) -> Path:
    """A random CLIP of these sizes."""
    frames = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    ids = np.zeros((1, config.context_length), np.int32)
    params = jax.jit(Clip(config).init)(jax.random.key(seed), frames, ids)["params"]
    save_clip(path, params, config, source=f"seed {seed}", source_sha256="")
    return path


def write_folder(root: Path) -> Path:
    """`root/videos` and `root/captions.csv`."""
    (root / "videos").mkdir()
    rows = ["video,caption,split"]
    for i in range(TRAIN + TEST):
        videos.write(root / "videos" / f"{i}.mp4", 6 + i % 5, width=32, height=32)
        rows.append(f"{i}.mp4,clip number {i},{'train' if i < TRAIN else 'test'}")
    (root / "captions.csv").write_text("\n".join(rows) + "\n")
    return root


def arguments(folder: Path, clip: Path, workdir: Path, *overrides: str) -> list[str]:
    """The command line of a run of four steps."""
    settings = {
        "init.clip": clip,
        "data.annotations": folder / "captions.csv",
        "data.videos": folder / "videos",
        "data.frames": 3,
        "data.short_side": 32,
        "data.threads": 2,
        "method.visual_prompts": 2,
        "method.text_prefix": 1,
        "method.text_suffix": 1,
        "compute.dtype": "float32",
        "train.steps": 4,
        "train.batch_size": 8,
        "train.log_every": 2,
        "train.checkpoint_every": 2,
        "eval.batch_size": 8,
    }
    return [
        f"--config={ROOT / 'configs/folder.py'}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
        *overrides,
    ]


def call(*argv: str, program: Callable[[list[str]], int] = main.main) -> int:
    """Runs the command line of `main`, or of another program, in this process.

    Returns:
        The exit status.
    """
    with restore_signals():
        return program([*argv])


def assert_refused(result: tuple[int, str, str], *messages: str) -> None:
    """Checks (status, stdout, stderr) of a wrong call: one line, with these messages."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, err
    for message in messages:
        assert message in lines[0]


@contextlib.contextmanager
def restore_signals():
    """Afterwards the signal handlers of the process are as they were."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def command(argv: list[str]) -> list[str]:
    """The command line of `main` for a process of its own; see `environment`."""
    return [sys.executable, "-m", "vop_jax.main", *argv]


def environment(devices: int = 1, *, quick: bool = True) -> dict[str, str]:
    """The environment of a process of its own, with the package on its path; see `xla.flags`.

    The processes of the tests share one cache of compiled programs.
    """
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices, quick=quick),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(xla.CACHE_BYTES),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
    }
