"""One config for each of the paper's benchmarks: what it sets, and that its docstring is true."""

import ast
import pathlib
import runpy

import pytest

from vop_jax.config import base as configs
from vop_jax.tuning.methods import METHODS

FOLDER = pathlib.Path(__file__).parents[2] / "configs"

# name: (data.kind, pairs of clip and caption to train on, frames, flip, checkpoint_every)
BENCHMARKS = {
    "msrvtt9k": ("msrvtt9k", 180_000, 12, True, 1000),
    "msrvtt7k": ("msrvtt7k", 140_200, 12, True, 1000),
    "didemo": ("didemo", 8_395, 12, False, 200),
    "didemo64": ("didemo", 8_395, 64, False, 200),
    "activitynet": ("activitynet", 10_009, 12, False, 200),
    "activitynet64": ("activitynet", 10_009, 64, False, 200),
    "lsmdc": ("lsmdc", 101_079, 12, True, 1000),
    "msvd": ("msvd", 48_774, 12, True, 1000),
    "vatex": ("vatex", 259_910, 12, True, 1000),
}


def load(name, *method):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](*method)


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_benchmark_for_every_method(name, method):
    kind, pairs, frames, flip, every = BENCHMARKS[name]
    config = load(name, method)
    expected = {
        "method.name": method,
        "data.kind": kind,
        "data.frames": frames,
        "data.flip": flip,
        "train.batch_size": 32,
        "train.steps": 5 * pairs // 32,
        "train.checkpoint_every": every,
    }
    base = configs.flatten_config(configs.base_config())
    # Everything else, the learning rate too, is the default.
    assert configs.flatten_config(config) == base | expected
    assert config.is_locked
    configs.validate(config)


def test_the_default_method_is_vop():
    assert {load(name).method.name for name in BENCHMARKS} == {"vop"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_commands_of_a_docstring_are_its_own(name):
    kind, _, frames, *_ = BENCHMARKS[name]
    told = " ".join(
        (ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or "").split()
    )
    told = told.replace("\\ ", "")
    sized = f" --frames={frames}" if frames != 12 else ""
    given = f"--config=configs/{name}.py:vop_f+c"
    stored = f"--config.data.records=records/{name}"
    for command in (
        f"vop_jax.data.prepare --dataset={kind}{sized} --videos=VIDEOS "
        f"--annotations=ANNOTATIONS --output=records/{name}",
        f"vop_jax.data.check {given} {stored}",
        f"vop_jax.main {given} --workdir=runs/{name}/vop_f+c "
        f"--config.init.clip=clip.safetensors {stored}",
    ):
        assert f"python -m {command} " in f"{told} "
