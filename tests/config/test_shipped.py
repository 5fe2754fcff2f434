"""The shipped configs: valid with every method, true to the published sizes and their docs."""

import ast
import runpy

import pytest

from tests.runs import ROOT
from vop_jax.config import base as configs
from vop_jax.tuning.methods import METHODS, MethodConfig

SHIPPED = {path.stem: path for path in (ROOT / "configs").glob("*.py")}
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


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_valid_with_every_method(name):
    get_config = runpy.run_path(str(SHIPPED[name]))["get_config"]
    assert get_config().method.name == "vop"
    for method in METHODS:
        config = get_config(method)
        configs.validate(config)
        assert config.is_locked and MethodConfig.from_mapping(config.method).name == method
        if name in BENCHMARKS:
            kind, pairs, frames, flip, every = BENCHMARKS[name]
            expected = {
                "method.name": method,
                "data.kind": kind,
                "data.frames": frames,
                "data.flip": flip,
                "train.batch_size": 32,
                "train.steps": 5 * pairs // 32,
                "train.checkpoint_every": every,
            }
            # Everything else, the learning rate too, is the default.
            base = configs.flatten_config(configs.base_config())
            assert configs.flatten_config(config) == base | expected


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_commands_of_a_docstring_are_its_own(name):
    kind, _, frames, *_ = BENCHMARKS[name]
    docstring = ast.get_docstring(ast.parse(SHIPPED[name].read_text())) or ""
    text = " ".join(docstring.split()).replace("\\ ", "")
    sized = f" --frames={frames}" if frames != 12 else ""
    config, records = f"--config={name}:vop_f+c", f"--config.data.records=records/{name}"
    for command in (
        f"vop prepare --dataset={kind}{sized} --videos=VIDEOS --annotations=ANNOTATIONS "
        f"--output=records/{name}",
        f"vop check {config} {records}",
        f"vop train {config} --workdir=runs/{name}/vop_f+c --config.init.clip=clip.safetensors "
        f"{records}",
    ):
        assert f" {command} " in f"{text} "
