"""scenic's config fields become ours.

A config may mix scenic's names, where both have one, and ours; None means not given, as in
scenic. What neither has, and what can't be had here, is an error: nothing is quietly left out.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vop_jax.config.base import base_config, flatten_config
from vop_jax.errors import UserError

DATASET = "vop_jax"  # our name in scenic's registry
IN_DATASET = "dataset_configs."  # these have our names of section `data`, or:
DATA = {"num_frames": "frames", "min_resize": "short_side"}

# scenic's name: ours.
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
# What is done here in any case: scenic's name: the values that say so.
GIVEN: dict[str, tuple[Any, ...]] = {
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
# Of the schedule: linear warm-up from 0, then one cosine to 0 at the last step.
FACTORS = {"constant", "linear_warmup", "cosine_decay"}
SCHEDULE = ("lr_configs.factors", "lr_configs.warmup_steps")
LAST_STEP = ("lr_configs.total_steps", "lr_configs.steps_per_cycle")
LABELS = ("experiment_name", "workdir_suffix")  # for people, and for scenic.app


def translate(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """A scenic config -> ours, locked; evaluation takes the training's batch size if none is given.

    Raises:
        UserError: the first field that neither has, that can't be honoured, or that is given in
            both names with different values.
    """
    fields = {name: value for name, value in flatten_config(config).items() if value is not None}
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in GIVEN and value not in GIVEN[name]:
            allowed = " or ".join(map(repr, GIVEN[name]))
            raise UserError(f"config.{name}={value!r}: vop_jax has no other than {allowed}")
        if name in GIVEN or name in (*SCHEDULE, *LAST_STEP, *LABELS):
            continue
        key = _our_name(name)
        if values.setdefault(key, value) != value:
            raise UserError(
                f"config.{name}={value!r}: config.{key} is given twice, also as {values[key]!r}"
            )
    if "train.batch_size" in values:
        values.setdefault("eval.batch_size", values["train.batch_size"])
    ours = with_values(values)
    _schedule(ours, fields)
    return ours


def with_values(values: Mapping[str, Any]) -> ConfigDict:
    """Our base config with {"train.steps": 100, …} set.

    Raises:
        UserError: a value of another type than the key's.
    """
    ours = base_config()
    for key, value in values.items():
        try:
            ours.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{key}={value!r}: {' '.join(str(error).split())}") from None
    return ours


def dataset_keys(dataset_configs: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """scenic's section of that name -> keys of our section `data`.

    Raises:
        UserError: a field that neither has.
    """
    given = {IN_DATASET + name: value for name, value in flatten_config(dataset_configs).items()}
    keys = {_our_name(name): value for name, value in given.items() if value is not None}
    return {key.removeprefix("data."): value for key, value in keys.items()}


def _our_name(name: str) -> str:
    declared = flatten_config(base_config())
    key = NAMES.get(name, name)
    if name.startswith(IN_DATASET):
        field = name.removeprefix(IN_DATASET)
        key = "data." + DATA.get(field, field)
    if key in declared:
        return key
    if name == "num_training_epochs":
        raise UserError(f"config.{name}: vop_jax counts steps; give config.num_training_steps")
    ours_in_dataset = [IN_DATASET + k.removeprefix("data.") for k in declared if "data." in k]
    known = [*NAMES, *GIVEN, *SCHEDULE, *LAST_STEP, *declared, *ours_in_dataset]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    hint = f"did you mean config.{near[0]}?" if near else "docs/scenic.md lists those there are"
    raise UserError(f"config.{name}: a field that vop_jax does not have; {hint}")


def _schedule(ours: ConfigDict, fields: Mapping[str, Any]) -> None:
    steps = ours.train.steps
    for name in LAST_STEP:
        if fields.get(name, steps) != steps:
            raise UserError(
                f"config.{name}={fields[name]!r}: the learning rate decays over all "
                f"config.num_training_steps={steps}"
            )
    factors = {factor.strip() for factor in fields.get(SCHEDULE[0], "*".join(FACTORS)).split("*")}
    if factors != FACTORS:
        raise UserError(
            f"config.{SCHEDULE[0]}={fields[SCHEDULE[0]]!r}: vop_jax has no other than "
            "'constant*linear_warmup*cosine_decay'"
        )
    if SCHEDULE[1] in fields:
        if "train.warmup" in fields:
            raise UserError(f"config.{SCHEDULE[1]}: config.train.warmup is given as well")
        ours.train.warmup = fields[SCHEDULE[1]] / max(1, steps)
