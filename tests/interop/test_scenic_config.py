"""scenic's config fields: what each becomes, and which are refused."""

import importlib.util

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.runs import ROOT
from vop_jax.config.base import base_config, flatten_config, validate
from vop_jax.errors import UserError
from vop_jax.interop.scenic_config import FIXED, LAST_STEP, NAMES, dataset_keys, translate
from vop_jax.training.step import learning_rate


def differences(config):
    """The keys that translation sets to other values than their defaults."""
    declared = flatten_config(base_config())
    return {k: v for k, v in flatten_config(translate(config)).items() if v != declared[k]}


def test_each_of_scenic_s_names_sets_ours():
    declared = flatten_config(base_config())
    for name, key in NAMES.items():
        value = "bfloat16" if isinstance(declared[key], str) else declared[key] + 1
        expected = {key: value}
        if name == "batch_size":
            expected["eval.batch_size"] = value
        assert differences({name: value}) == expected
    assert differences(ConfigDict()) == {}


@pytest.mark.parametrize("name", FIXED)
def test_a_field_with_a_fixed_value_allows_no_other(name):
    for value in (*FIXED[name], None):
        assert differences({name: value}) == {}
    with pytest.raises(UserError, match=rf"config\.{name}='other': allowed is only"):
        translate({name: "other"})


def test_our_names_and_those_of_a_dataset():
    data = {"num_frames": 4, "min_resize": 64, "kind": "msrvtt9k"}
    config = {"method": {"name": "vop_f"}, "dataset_configs": data, "experiment_name": "mine"}
    assert differences(config) == {
        "method.name": "vop_f",
        "data.frames": 4,
        "data.short_side": 64,
        "data.kind": "msrvtt9k",
    }
    assert dataset_keys(data | {"videos": None}) == {
        "frames": 4,
        "short_side": 64,
        "kind": "msrvtt9k",
    }
    ours = base_config().to_dict() | {"rng_seed": 0}  # a config of ours needs only scenic's seed
    ours["train"]["steps"] = 7
    assert differences(ours) == {"train.steps": 7}
    assert translate({"batch_size": 8, "train.batch_size": 8}).train.batch_size == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_trainig_steps": 3}, r"num_trainig_steps: .*mean config\.num_training_steps\?"),
        ({"num_training_epochs": 3}, "num_training_epochs: .*num_training_steps"),
        ({"mixup.alpha": 0.5}, r"mixup\.alpha: not a field of vop_jax"),
        ({"dataset_configs.num_fames": 3}, r"dataset_configs\.num_fames"),
        ({"dataset_configs.stride": 2}, r"dataset_configs\.stride: not a field"),
        ({"lr_configs.factors": "constant*rsqrt_decay"}, "factors='constant.*linear_warmup"),
        ({"lr_configs.total_steps": 5}, r"total_steps=5: .*num_training_steps=1000"),
        ({"num_training_steps": "many"}, r"train\.steps='many'"),
        ({"batch_size": 8, "train.batch_size": 16}, r"train\.batch_size is set twice.*8"),
        ({"lr_configs.warmup_steps": 8, "train.warmup": 0.5}, r"train\.warmup is set as well"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_an_error(fields, message):
    with pytest.raises(UserError, match=message) as error:
        translate(fields)
    assert "\n" not in str(error.value)


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


def test_the_learning_rate_is_scenic_s(real_scenic):
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
