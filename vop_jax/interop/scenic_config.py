"""Translates scenic's config fields into ours.

A config may mix scenic's names and ours; None means not set, as in scenic. A field that neither
has, or a value that vop_jax cannot honour, is an error, so that nothing is silently ignored.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vop_jax.config.base import base_config, flatten_config
from vop_jax.errors import UserError

DATASET = "vop_jax"  # our name in scenic's registry
SECTION = "dataset_configs."  # its fields have the names of our section `data`, or these:
DATA = {"num_frames": "frames", "min_resize": "short_side"}

# {scenic's name: ours}
NAMES = {
    "rng_seed": "seed",
    "batch_size": "train.batch_size",
    "eval_batch_size": "eval.batch_size",
    "num_training_steps": "train.steps",
    "lr_configs.base_learning_rate": "train.learning_rate",
    "optimizer_configs.weight_decay": "train.weight_decay",
    "max_grad_norm": "train.clip_norm",
    "grad_clip_configs.clip_value": "train.clip_norm",
    "log_summary_steps": "train.log_every",
    "log_eval_steps": "train.eval_every",
    "checkpoint_steps": "train.checkpoint_every",
    "max_checkpoint_keep": "train.keep_checkpoints",
    "model_dtype_str": "compute.dtype",
}
# {scenic's name: allowed values}: vop_jax always does what these fields may choose.
FIXED: dict[str, tuple[Any, ...]] = {
    "dataset_name": (DATASET,),
    "trainer_name": (DATASET,),
    "model_name": (DATASET,),
    "data_dtype_str": ("uint8",),
    "optimizer": ("adamw",),
    "optimizer_configs.optimizer": ("adamw",),
    "optimizer_configs.b1": (0.9,),
    "optimizer_configs.beta1": (0.9,),
    "optimizer_configs.b2": (0.999,),
    "optimizer_configs.beta2": (0.999,),
    "optimizer_configs.eps": (1e-8,),
    "optimizer_configs.epsilon": (1e-8,),
    "optimizer_configs.skip_scale_and_bias_regularization": (True,),
    "grad_clip_configs.clip_method": ("clip_by_global_norm",),
    "lr_configs.learning_rate_schedule": ("compound",),
    "lr_configs.end_learning_rate": (0,),
    "lr_configs.alpha": (0,),
    "checkpoint": (True,),
    "write_summary": (True,),
    "xprof": (False,),
    "debug_train": (False,),
    "debug_eval": (False,),
}
# The learning rate rises linearly from 0, then falls by one cosine to 0 at the last step.
FACTORS, WARMUP = "lr_configs.factors", "lr_configs.warmup_steps"
OUR_FACTORS = "constant*linear_warmup*cosine_decay"
LAST_STEP = ("lr_configs.total_steps", "lr_configs.steps_per_cycle")
IGNORED = ("experiment_name", "workdir_suffix")  # labels for people and for scenic.app
OTHER = (FACTORS, WARMUP, *LAST_STEP, *IGNORED)


def translate(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """A config of scenic as a config of ours, locked.

    Evaluation has the batch size of training unless the config sets another.

    Raises:
        UserError: a field is unknown, cannot be honoured, or is set under both names with
            different values.
    """
    fields = {name: value for name, value in flatten_config(config).items() if value is not None}
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in FIXED and value not in FIXED[name]:
            allowed = " or ".join(map(repr, FIXED[name]))
            raise UserError(f"config.{name}={value!r}: allowed is only {allowed}")
        if name in FIXED or name in OTHER:
            continue
        key = _our_name(name)
        if values.setdefault(key, value) != value:
            other = f"config.{key} is set twice, also to {values[key]!r}"
            raise UserError(f"config.{name}={value!r}: {other}")
    if "train.batch_size" in values:
        values.setdefault("eval.batch_size", values["train.batch_size"])
    ours = with_values(values)
    _translate_schedule(ours, fields)
    return ours


def with_values(values: Mapping[str, Any]) -> ConfigDict:
    """Our base config with {"train.steps": 100, …} set.

    Raises:
        UserError: a value has another type than its key.
    """
    ours = base_config()
    for key, value in values.items():
        try:
            ours.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{key}={value!r}: {' '.join(str(error).split())}") from None
    return ours


def dataset_keys(dataset_configs: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """scenic's section of that name as keys of our section `data`.

    Raises:
        UserError: a field is unknown.
    """
    fields = {SECTION + name: value for name, value in flatten_config(dataset_configs).items()}
    keys = {_our_name(name): value for name, value in fields.items() if value is not None}
    return {key.removeprefix("data."): value for key, value in keys.items()}


def _our_name(name: str) -> str:
    declared = flatten_config(base_config())
    key = NAMES.get(name, name)
    if name.startswith(SECTION):
        field = name.removeprefix(SECTION)
        key = "data." + DATA.get(field, field)
    if key in declared:
        return key
    if name == "num_training_epochs":
        raise UserError(f"config.{name}: vop_jax counts steps; set config.num_training_steps")
    ours_in_section = [SECTION + k.removeprefix("data.") for k in declared if "data." in k]
    known = [*NAMES, *FIXED, *OTHER, *declared, *ours_in_section]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    hint = f"did you mean config.{near[0]}?" if near else "docs/guides/scenic.md lists all fields"
    raise UserError(f"config.{name}: not a field of vop_jax; {hint}")


def _translate_schedule(ours: ConfigDict, fields: Mapping[str, Any]) -> None:
    steps = ours.train.steps
    for name in LAST_STEP:
        if fields.get(name, steps) != steps:
            raise UserError(
                f"config.{name}={fields[name]!r}: the learning rate always decays over all "
                f"config.num_training_steps={steps}"
            )
    factors = fields.get(FACTORS, OUR_FACTORS)
    if {factor.strip() for factor in factors.split("*")} != {*OUR_FACTORS.split("*")}:
        raise UserError(f"config.{FACTORS}={factors!r}: allowed is only {OUR_FACTORS!r}")
    if WARMUP in fields:
        if "train.warmup" in fields:
            raise UserError(f"config.{WARMUP}: config.train.warmup is set as well")
        ours.train.warmup = fields[WARMUP] / max(1, steps)
