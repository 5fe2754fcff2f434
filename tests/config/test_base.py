"""The config: its defaults, its checks, and what a run's config may change."""

import json
import math
import sys

import absl.flags
import pytest
from ml_collections import config_flags

from vop_jax.config import base as configs
from vop_jax.config.keys import EXTRAS, KEYS, table
from vop_jax.errors import UserError
from vop_jax.tuning.methods import MethodConfig


def with_value(key, value):
    """The base config with any value at a key, of any type."""
    config = configs.base_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    return config


def refusal(key, value):
    """The message of `validate` for the base config with this value."""
    config = with_value(key, value)
    if key == "compute.attention":
        config.compute.dtype = "float32"
    with pytest.raises(UserError) as caught:
        configs.validate(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_base_config_is_valid_and_locked_at_every_level():
    config = configs.base_config()
    configs.validate(config)
    MethodConfig.from_mapping(config.method)
    with pytest.raises((AttributeError, KeyError), match="lerning_rate"):
        config.train.lerning_rate = 1.0
    with pytest.raises((AttributeError, KeyError), match="trian"):
        config.trian = 1
    with pytest.raises(TypeError):
        config.train.steps = "many"
    config.train.steps = 1
    assert configs.base_config().train.steps == 1000, "nobody shares a config"


def test_the_reference_table_has_a_row_for_each_key():
    rows = {row.key: row for row in table()}
    assert list(rows) == list(KEYS)
    assert all(row.default and row.allowed and row.meaning for row in rows.values())
    assert rows["seed"].allowed == "0 to 4294967295"
    assert rows["train.batch_size"].allowed == "1 or more"
    assert rows["train.clip_norm"].allowed == "more than 0"
    assert rows["pretrain.learning_rate"].meaning == "Peak learning rate."
    assert rows["data.short_clips"].allowed == "skip, repeat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.train.update(lerning_rate=1.0), r"config.train.learning_rate\?$"),
        (lambda c: c.update(zzzzzz=1), r"^config.zzzzzz: no such key; there are clip, compute, "),
        (lambda c: c.train.update(lr=3), r"lr: no such key; there are train.batch_size, train.ch"),
        (lambda c: c.train.__delitem__("steps"), r"config.train.steps: missing"),
    ],
)
def test_unknown_and_missing_keys_are_named(change, message):
    config = configs.base_config()
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=message):
        configs.validate(config)


def test_choices_are_listed():
    keys = {name: key for name, key in KEYS.items() if key.choices}
    assert {"train.select", "compute.remat", "method.cmm", "clip.arch"} <= keys.keys()
    for name, key in keys.items():
        message = refusal(name, "wrong")
        assert message.startswith(f"config.{name}='wrong': allowed are ")
        assert all(choice in message for choice in key.choices)


def test_numbers_out_of_range_are_refused():
    keys = {name: key for name, key in KEYS.items() if key.low is not None or key.above is not None}
    assert {"seed", "train.clip_norm", "data.max_skipped", "method.split_layer"} <= keys.keys()
    for name, key in keys.items():
        bad = [-2, math.nan, math.inf]
        bad += [key.high + 1] if key.high < math.inf else []
        bad += [key.above] if key.above is not None else [key.low - 1]
        for value in bad:
            typed = type(key.default)(value) if math.isfinite(value) else value
            assert refusal(name, value) == f"config.{name}={typed}: must be {key.allowed}"
        if key.low is not None:
            configs.validate(with_value(name, key.low))
        if key.high < math.inf:
            configs.validate(with_value(name, key.high))


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        (
            "data.text_buckets",
            [32, "32", (1,), (32.0,), (True,), ("32",), None],
            "must be a tuple of whole numbers, 2 or more",
        ),
        (
            "data.crop_scale",
            [(0.0, 1.0), (0.6, 0.5), (0.5, 1.5), (0.5,), (math.nan, 1.0), (0.5, math.nan)],
            "must be (low, high), 0 < low <= high <= 1",
        ),
        (
            "eval.extra",
            [("softmax",), "dual", 3, (3,), ("dual_softmax", "x")],
            ": allowed are dual_softmax, query_bank",
        ),
        ("data.sampling", ["rand"], "set data.stored_fps > 0"),
        ("mesh.data", [0, -2], "a number of devices, or -1"),
        ("compute.attention", ["fused", "cudnn"], "needs config.compute.dtype='bfloat16'"),
        ("train.select", ["best"], "needs config.train.eval_every > 0"),
    ],
)
def test_values_with_a_rule_of_their_own(key, values, message):
    for value in values:
        refused = refusal(key, value)
        assert refused.startswith(f"config.{key}=") and message in refused


def test_text_buckets_that_are_valid():
    for widths in ((), (32,), (48, 16), [2]):
        configs.validate(with_value("data.text_buckets", widths))


def test_extras_may_be_a_list_or_a_string(monkeypatch):
    both = "dual_softmax,query_bank"
    for value in (list(EXTRAS), both, (both.replace(",", ", "),), EXTRAS * 2):
        configs.validate(with_value("eval.extra", value))
        assert configs.extra_rows(with_value("eval.extra", value)) == EXTRAS
    for value in ((), "", ("",)):
        assert configs.extra_rows(with_value("eval.extra", value)) == ()
    one_by_one = [f"--config.eval.extra={name}" for name in EXTRAS]
    for flags in ([f"--config.eval.extra={both}"], one_by_one, [f"--config.eval.extra={EXTRAS}"]):
        monkeypatch.setattr(sys, "argv", ["main", *flags])  # overrides are looked up there
        values = absl.flags.FlagValues()
        config_flags.DEFINE_config_dict("config", configs.base_config(), flag_values=values)
        values(sys.argv)
        assert configs.extra_rows(values.config) == EXTRAS


def test_a_bank_of_the_evaluated_split_is_refused():
    config = with_value("eval.extra", ("query_bank",))
    config.data.eval_split = "train"
    with pytest.raises(UserError, match=r"'query_bank': the bank comes from .*'train' is also"):
        configs.validate(config)
    config.eval.extra = ("dual_softmax",)
    configs.validate(config)


def test_a_difference_is_named_with_both_values():
    base = configs.base_config()
    assert configs.first_difference(base, json.loads(json.dumps(base.to_dict()))) is None
    for key, value in (("train.learning_rate", 1.0), ("method.name", "bias"), ("seed", 7)):
        other, default = with_value(key, value), KEYS[key].default
        assert configs.first_difference(other, base) == (key, value, default)
        assert configs.first_difference(base, other) == (key, default, value)
    # What does not affect the parameters may change.
    assert {"data.threads", "compute.remat", "eval.extra"} <= {*configs.RESUMABLE}
    assert {*configs.EVALUABLE} - {*configs.RESUMABLE} == {"data.eval_split", "eval.missing"}
    for key in configs.RESUMABLE:
        assert configs.first_difference(with_value(key, "other"), base) is None


def test_the_config_of_an_older_or_newer_version(tmp_path):
    """A key that it lacks has its default; one that is unknown here is a difference."""
    base, older = configs.base_config(), configs.base_config().to_dict()
    del older["train"]["warmup"]
    assert configs.first_difference(base, older) is None
    assert configs.first_difference(with_value("train.warmup", 0.5), older)[1:] == (0.5, 0.1)
    older["mesh"]["placement"] = [["x", [None, "model"]]]
    (tmp_path / "config.json").write_text(json.dumps(older))
    read = configs.workdir_config(tmp_path)
    assert read.is_locked and read.mesh.placement == (("x", [None, "model"]),)
    assert read.train.warmup == 0.1 and read.data.crop_scale == (0.5, 1.0)
    older["train"]["momentum"] = 0.9
    assert configs.first_difference(base, older) == ("train.momentum", None, 0.9)
    assert configs.workdir_config(tmp_path / "none") is None


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"train": 3}', b'{"train": {"steps": "4"}}', b'{"momentum": 1}']
)
def test_a_damaged_config_in_a_workdir_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json: damaged.*delete it, and the command") as e:
        configs.workdir_config(tmp_path)
    assert "\n" not in str(e.value)
