"""scenic's config fields: what becomes of each, and what is refused."""

import importlib.util

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.interop.scenic_there import lenient, needs_scenic  # noqa: F401
from tests.runs import ROOT
from vop_jax.config.base import base_config, flatten_config, validate
from vop_jax.errors import UserError
from vop_jax.interop import scenic_config
from vop_jax.interop.scenic_config import GIVEN, LAST_STEP, NAMES, translate
from vop_jax.training.step import learning_rate


def nested(**fields):
    """{"a__b": 1} -> a ConfigDict."""
    config = ConfigDict()
    for name, value in fields.items():
        section, _, key = name.rpartition("__")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[key] = value
    return config


def differences(config):
    declared = flatten_config(base_config())
    return {k: v for k, v in flatten_config(config).items() if v != declared[k]}


def test_nothing_given_is_our_base_config():
    assert differences(translate(ConfigDict())) == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_scenics_sets_ours(name):
    key = NAMES[name]
    declared = flatten_config(base_config())[key]
    value = "bfloat16" if isinstance(declared, str) else declared + 1
    found = differences(translate(nested(**{name.replace(".", "__"): value})))
    assert found.pop(key) == value
    assert found == ({"eval.batch_size": value} if name == "batch_size" else {})


def test_every_name_is_one_of_ours():
    assert set(NAMES.values()) <= set(flatten_config(base_config()))


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_done_anyway_may_be_said_and_nothing_else(name):
    field = name.replace(".", "__")
    for value in (*GIVEN[name], None):
        assert differences(translate(nested(**{field: value}))) == {}
    with pytest.raises(UserError, match=rf"config\.{name}='other': .*no other than"):
        translate(nested(**{field: "other"}))


def test_our_names_and_the_dataset_s():
    config = nested(
        method__name="vop_f",
        mesh__fsdp=2,
        train__clip_norm=2.0,
        dataset_configs__num_frames=4,
        dataset_configs__min_resize=64,
        dataset_configs__kind="msrvtt9k",
        experiment_name="mine",
    )
    assert differences(translate(config)) == {
        "method.name": "vop_f",
        "mesh.fsdp": 2,
        "train.clip_norm": 2.0,
        "data.frames": 4,
        "data.short_side": 64,
        "data.kind": "msrvtt9k",
    }


def test_a_config_of_ours_needs_the_seed_alone():
    ours = base_config()
    ours.train.steps = 7
    with ours.unlocked():
        ours.rng_seed = 0
    assert differences(translate(ours)) == {"train.steps": 7}


def test_given_twice():
    assert translate(nested(batch_size=8, train__batch_size=8)).train.batch_size == 8
    with pytest.raises(UserError, match=r"config\.train\.batch_size is given twice.*8"):
        translate(nested(batch_size=8, train__batch_size=16))
    with pytest.raises(UserError, match=r"warmup_steps: config\.train\.warmup is given as well"):
        translate(nested(lr_configs__warmup_steps=8, train__warmup=0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_trainig_steps": 3}, r"num_trainig_steps: .*mean config\.num_training_steps\?"),
        ({"num_training_epochs": 3}, "num_training_epochs: .*num_training_steps"),
        ({"mixup__alpha": 0.5}, r"mixup\.alpha: a field that vop_jax does not have"),
        ({"dataset_configs__num_fames": 3}, r"dataset_configs\.num_fames"),
        ({"dataset_configs__stride": 2}, r"dataset_configs\.stride: a field"),
        ({"lr_configs__factors": "constant*rsqrt_decay"}, "factors='constant.*linear_warmup"),
        ({"lr_configs__total_steps": 5}, r"total_steps=5: .*num_training_steps=1000"),
        ({"num_training_steps": "many"}, r"train\.steps='many'"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(fields, message):
    with pytest.raises(UserError, match=message) as info:
        translate(nested(**fields))
    assert "\n" not in str(info.value)


SCHEDULE = {
    "learning_rate_schedule": "compound",
    "factors": "constant * cosine_decay * linear_warmup",
    "base_learning_rate": 0.5,
    "warmup_steps": 30,
    **{name.removeprefix("lr_configs."): 90 for name in LAST_STEP},
}


def test_warm_up_is_counted_in_steps():
    ours = translate(ConfigDict({"num_training_steps": 90, "lr_configs": SCHEDULE}))
    validate(ours)
    rates = [float(learning_rate(ours.train)(step)) for step in (0, 15, 30, 60, 90)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.25, 0], atol=1e-6)


@needs_scenic
def test_the_learning_rate_is_scenics(lenient):  # noqa: F811
    from scenic.train_lib import lr_schedules

    config = ConfigDict({"num_training_steps": 90, "lr_configs": SCHEDULE})
    theirs, mine = lr_schedules.get_learning_rate_fn(config), learning_rate(translate(config).train)
    for step in range(90):
        assert float(theirs(step)) == pytest.approx(float(mine(step)), abs=1e-6)


def test_the_shipped_config_is_the_demo():
    def load(path):
        spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config()

    assert flatten_config(translate(load("scenic/vop_demo.py"))) == flatten_config(load("demo.py"))


def test_dataset_keys():
    assert scenic_config.dataset_keys({"num_frames": 4, "flip": False, "videos": None}) == {
        "frames": 4,
        "flip": False,
    }
