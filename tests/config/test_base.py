import json
import math
import pathlib
import re
import runpy
import types

import numpy as np
import pytest
from etils import epath

from vop_jax.config import base as configs
from vop_jax.errors import UserError
from vop_jax.experiment import setup
from vop_jax.tuning.methods import METHODS, MethodConfig

SHIPPED = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
NUMBERS = (
    *configs.AT_LEAST_ONE,
    *configs.AT_LEAST_ZERO,
    *configs.ABOVE_ZERO,
    *configs.SHARES,
    "data.jpeg_quality",
    "seed",
)


def changed(**values):
    """The base config with `data__frames=0` set at `data.frames`, as a user would."""
    config = configs.base_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def with_raw(key, value):
    """The base config with any value at a key, of any type."""
    config = configs.base_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    return config


def shipped(path, *method):
    return runpy.run_path(str(path))["get_config"](*method)


def test_the_base_config_is_valid():
    configs.validate(configs.base_config())
    MethodConfig.from_mapping(configs.base_config().method)


def test_the_base_config_is_locked_at_every_level():
    config = configs.base_config()
    with pytest.raises((AttributeError, KeyError), match="lerning_rate"):
        config.train.lerning_rate = 1.0
    with pytest.raises((AttributeError, KeyError), match="trian"):
        config.trian = 1
    assert changed() is not configs.base_config()  # nobody shares one
    with pytest.raises(TypeError):
        config.train.steps = "many"


def test_a_misspelt_key_names_the_nearest():
    config = configs.base_config()
    with config.unlocked():
        config.train.lerning_rate = 1.0
    with pytest.raises(UserError, match=r"train.lerning_rate: .*mean config.train.learning_rate\?"):
        configs.validate(config)


def test_an_unheard_of_key_is_refused_with_what_there_is():
    config = configs.base_config()
    with config.unlocked():
        config.zzzzzz = 1
    with pytest.raises(UserError, match=r"^config.zzzzzz: no such key; there are clip, compute, "):
        configs.validate(config)


def test_a_missing_key_is_named():
    config = configs.base_config()
    with config.unlocked():
        del config.train["steps"]
    with pytest.raises(UserError, match=r"config.train.steps: missing"):
        configs.validate(config)


@pytest.mark.parametrize("key", configs.ALLOWED)
def test_choices_are_listed(key):
    with pytest.raises(UserError) as caught:
        configs.validate(with_raw(key, "wrong"))
    message = str(caught.value)
    assert f"config.{key}='wrong'" in message
    assert all(repr(allowed) in message for allowed in configs.ALLOWED[key])


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_out_of_range_and_nan_are_refused(key, bad):
    with pytest.raises(UserError, match=rf"config.{key}=\S+: must be "):
        configs.validate(with_raw(key, bad))


@pytest.mark.parametrize("key", configs.AT_LEAST_ONE)
def test_sizes_start_at_one(key):
    with pytest.raises(UserError, match=rf"config.{key}=0: must be 1 or more"):
        configs.validate(with_raw(key, 0))
    configs.validate(with_raw(key, 1))


@pytest.mark.parametrize("key", configs.AT_LEAST_ZERO)
def test_what_may_be_zero(key):
    configs.validate(with_raw(key, 0))


@pytest.mark.parametrize("key", configs.ABOVE_ZERO)
def test_what_may_not_be_zero(key):
    with pytest.raises(UserError, match=rf"config.{key}=0.0: must be more than 0"):
        configs.validate(with_raw(key, 0.0))


def test_a_seed_has_as_many_bits_as_are_used():
    with pytest.raises(UserError, match=r"config.seed=4294967296: must be 0 to 4294967295"):
        configs.validate(with_raw("seed", 2**32))
    configs.validate(with_raw("seed", 0))


@pytest.mark.parametrize("key", configs.SHARES)
def test_shares_end_at_one(key):
    with pytest.raises(UserError, match=rf"config.{key}=1.5: must be 0 to 1"):
        configs.validate(with_raw(key, 1.5))
    configs.validate(with_raw(key, 1.0))


@pytest.mark.parametrize("given", [32, "32", (1,), (32.0,), (True,), ("32",), None])
def test_text_buckets_that_cannot_be(given):
    with pytest.raises(UserError, match=r"config.data.text_buckets=.*whole numbers, 2 or more"):
        configs.validate(with_raw("data.text_buckets", given))


@pytest.mark.parametrize("given", [(), (32,), (48, 16), [2]])
def test_text_buckets_that_can_be(given):
    configs.validate(with_raw("data.text_buckets", given))


@pytest.mark.parametrize(
    "scale", [(0.0, 1.0), (0.6, 0.5), (0.5, 1.5), (0.5,), (math.nan, 1.0), (0.5, math.nan)]
)
def test_crop_scales_that_cannot_be(scale):
    with pytest.raises(UserError, match=r"config.data.crop_scale=.*0 < low <= high <= 1"):
        configs.validate(with_raw("data.crop_scale", scale))


def test_random_sampling_needs_frames_to_choose_from():
    with pytest.raises(UserError, match=r"set data.stored_fps > 0"):
        configs.validate(changed(data__sampling="rand"))
    configs.validate(changed(data__sampling="rand", data__stored_fps=3.0))


@pytest.mark.parametrize("devices", [0, -2])
def test_numbers_of_devices_that_cannot_be(devices):
    with pytest.raises(UserError, match=rf"config.mesh.data={devices}: a number of devices, or -1"):
        configs.validate(changed(mesh__data=devices))


def test_messages_are_one_line():
    for key in NUMBERS:
        with pytest.raises(UserError) as caught:
            configs.validate(with_raw(key, -1))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_config_is_valid_with_every_method(path, method):
    config = shipped(path, method)
    configs.validate(config)
    assert config.is_locked
    assert MethodConfig.from_mapping(config.method).name == method


def test_there_are_shipped_configs():
    assert {"demo", "folder"} <= {path.stem for path in SHIPPED}


def test_flatten_names_every_leaf():
    flat = configs.flatten_config({"a": {"b": 1, "c": {"d": 2}}, "e": (3,)})
    assert flat == {"a.b": 1, "a.c.d": 2, "e": (3,)}


def test_every_key_named_in_a_rule_is_declared():
    declared = configs.flatten_config(configs.base_config())
    assert {*configs.ALLOWED, *NUMBERS, *configs.RESUMABLE} <= declared.keys()


def test_no_difference_to_itself_read_back_from_json():
    config = configs.base_config()
    assert configs.first_difference(config, json.loads(json.dumps(config.to_dict()))) is None


@pytest.mark.parametrize(
    ("key", "value"), [("train.learning_rate", 1.0), ("method.name", "bias"), ("seed", 7)]
)
def test_a_difference_is_named_with_both_values(key, value):
    base, other = configs.base_config(), configs.base_config()
    other.update_from_flattened_dict({key: value})
    was = configs.flatten_config(base)[key]
    assert configs.first_difference(other, base) == (key, value, was)
    assert configs.first_difference(base, other) == (key, was, value)


def test_a_key_that_an_older_config_lacks_stands_for_its_default():
    base, other = configs.base_config(), configs.base_config()
    other.train.warmup = 0.5
    older = base.to_dict()
    del older["train"]["warmup"]
    assert configs.first_difference(base, older) is None
    assert configs.first_difference(other, older) == ("train.warmup", 0.5, base.train.warmup)
    assert configs.first_difference(older, other) == ("train.warmup", base.train.warmup, 0.5)


def test_a_key_that_is_not_known_any_more_is_a_difference():
    base = configs.base_config().to_dict()
    older = {**base, "train": {**base["train"], "momentum": 0.9}}
    assert configs.first_difference(base, older) == ("train.momentum", None, 0.9)


@pytest.mark.parametrize("key", configs.RESUMABLE)
def test_what_changes_nothing_learnt_is_no_difference(key):
    assert configs.first_difference(with_raw(key, "other"), configs.base_config()) is None


class Devices:
    """As much of a mesh as the choice of a kernel looks at."""

    def __init__(self, platform, version, data, model=1):
        client = types.SimpleNamespace(platform_version=version)
        device = types.SimpleNamespace(platform=platform, client=client)
        self.devices = np.array([device] * (data * model)).reshape(data, 1, model)
        self.shape = {"data": data, "fsdp": 1, "model": model}


@pytest.mark.parametrize(
    ("platform", "version", "shape", "dtype", "kernel"),
    [
        ("cpu", "cpu", (1,), "bfloat16", "xla"),
        ("tpu", "libtpu", (4,), "bfloat16", "xla"),
        ("gpu", "PJRT C API cuda 13000", (1,), "bfloat16", "fused"),
        ("gpu", "PJRT C API cuda 13000", (8,), "bfloat16", "fused"),
        ("gpu", "PJRT C API cuda 13000", (4, 2), "bfloat16", "cudnn"),
        ("gpu", "PJRT C API cuda 13000", (1,), "float32", "xla"),
        ("gpu", "PJRT C API rocm 60000", (1,), "bfloat16", "xla"),
    ],
)
def test_attention_is_by_default_what_the_device_has(platform, version, shape, dtype, kernel):
    config = configs.base_config()
    config.compute.dtype = dtype
    assert setup.kernel_of(config, Devices(platform, version, *shape)) == kernel
    config.compute.attention = "blocks"
    assert setup.kernel_of(config, Devices(platform, version, *shape)) == "blocks"


def test_a_store_without_its_package_is_told_by_its_key(monkeypatch):
    def missing(path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(epath.Path("gs://b").__class__, "exists", missing)
    config = configs.base_config()
    config.init.clip = "gs://b/clip"
    says = "config.init.clip=gs://b/clip: Please install gcsfs; pip install -e '.[gcs]'"
    with pytest.raises(UserError, match=re.escape(says)):
        setup._check_stores(config)


@pytest.mark.parametrize(
    ("asked", "devices", "says"),
    [
        ("fused", Devices("cpu", "cpu", 1), "'fused': needs an NVIDIA GPU, not cpu"),
        ("cudnn", Devices("gpu", "rocm", 1), "'cudnn': needs an NVIDIA GPU, not gpu"),
        ("splash", Devices("gpu", "cuda", 1), "'splash': needs a TPU, not gpu"),
        (
            "splash",
            Devices("tpu", "libtpu", 4, 2),
            "set mesh.fsdp and mesh.model to 1; allowed on this mesh are auto, xla, blocks",
        ),
        (
            "fused",
            Devices("gpu", "cuda", 4, 2),
            "'fused': wants all parameters on every device, set mesh.fsdp and mesh.model to 1; "
            "allowed on this mesh are auto, cudnn, xla, blocks",
        ),
    ],
)
def test_a_kernel_that_the_devices_lack_is_refused(asked, devices, says):
    config = configs.base_config()
    config.compute.attention = asked
    with pytest.raises(UserError, match=re.escape(says)):
        setup.check_kernel(config, devices)
