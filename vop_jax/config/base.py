"""The config of a run: made from `keys.py`, read from a workdir, checked and compared.

Config files under `configs/` call `base_config()` and change values. The config is locked, so a
key that `keys.py` does not declare cannot be set.
"""

import dataclasses
import difflib
import json
import os
import pathlib
import runpy
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vop_jax.config.keys import EXTRAS, KEYS, TRACKERS, RunConfig
from vop_jax.errors import UserError

# In a workdir.
CONFIG_FILE, SUMMARY_FILE = "config.json", "summary.json"
RANKINGS_FILE = "rankings.jsonl"
ON_CUDA = ("fused", "cudnn")  # values of compute.attention
# Runs compare these by content: the CLIP's parameters, ids and captions of the training split.
INPUTS = ("init.clip", "data.annotations", "data.videos", "data.records")
# Keys that may change when a run continues, and when it is evaluated or exported.
RESUMABLE = tuple(name for name, key in KEYS.items() if key.change == "resume")
EVALUABLE = tuple(name for name, key in KEYS.items() if key.change != "never")


def base_config() -> ConfigDict:
    """The default config: the paper's recipe on a folder of videos; locked."""
    return ConfigDict(dataclasses.asdict(RunConfig())).lock()


def shipped_configs() -> dict[str, pathlib.Path]:
    """The config files that come with the package, by name: {"demo": …/demo.py, …}."""
    package = pathlib.Path(__file__).parents[1]
    folder = package / "configs"  # of an installed package; a clone has it beside the package
    folder = folder if folder.is_dir() else package.parent / "configs"
    paths = sorted(folder.rglob("*.py"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def load_config(name: str) -> ConfigDict:
    """The config of FILE or FILE:METHOD, where FILE may be the name of a shipped config.

    Raises:
        UserError: `name` is empty, no such file, or its `get_config` does not return a config.
    """
    file, colon, method = name.partition(":")
    shipped = shipped_configs()
    if not name:
        raise UserError(f"--config=FILE is missing; shipped configs are {', '.join(shipped)}")
    path = file if os.path.isfile(file) else os.fspath(shipped.get(file, ""))
    if not path:
        near = difflib.get_close_matches(file, shipped, n=1)
        hint = f"did you mean {near[0]}?" if near else f"shipped configs are {', '.join(shipped)}"
        raise UserError(f"--config={file}: no such file; {hint}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"--config={file}: the file defines no get_config()")
        config = get_config(method) if colon else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config: {_location(error, path)}{_last_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={file}: get_config() must return base_config() with changes")
    return config


def _location(error: Exception, path: str) -> str:
    """FILE:LINE where a config file raised an exception, and its type."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    return f"{path}:{line}: {type(error).__name__}: " if line else f"{path}: "


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"train.steps": 1000, ...}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten_config(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, flat, with the defaults of keys that are newer than it."""
    return {name: key.default for name, key in KEYS.items()} | flatten_config(config)


def workdir_config(workdir: epath.PathLike) -> ConfigDict | None:
    """The config of a workdir's run, with the defaults of keys that are newer than it.

    Returns:
        None where the workdir has no config.

    Raises:
        UserError: its config.json is damaged, or has unknown keys or values.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        return None
    try:
        values = _with_defaults(json.loads(path.read_bytes()))
        check_keys(values)
        config = base_config()
        for name, value in values.items():
            is_tuple = isinstance(KEYS[name].default, tuple)
            config.update_from_flattened_dict({name: _as_tuple(value) if is_tuple else value})
        return config
    except (ValueError, TypeError, AttributeError, KeyError, UserError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"{path}: damaged, or of another version ({line}); delete it, and the command that "
            "made the run, with its --config, writes it anew"
        ) from None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Restores the tuples of a value, which JSON turns into lists."""
    if isinstance(value, list | tuple):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return (value,)


def extra_rows(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `eval.extra`, each once; it may be a list, or a string with commas.

    Raises:
        UserError: a name is not in EXTRAS, or the query bank would come from the evaluated split.
    """
    names = _names("eval.extra", config["eval"]["extra"], EXTRAS)
    split = config["data"]["eval_split"]
    if "query_bank" in names and config["data"]["train_split"] == split:
        raise UserError(
            f"config.eval.extra='query_bank': the bank comes from data.train_split, and {split!r} "
            "is also data.eval_split"
        )
    return names


def trackers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `log.to`, each once; UserError for a name that is not in TRACKERS."""
    return _names("log.to", config["log"]["to"], TRACKERS)


def _names(key: str, value: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    """The names in a value, each once: a list, or a string with commas."""
    try:
        names = ",".join([value] if isinstance(value, str) else value).split(",")
    except TypeError:
        names = [repr(value)]
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if name not in allowed:
            raise UserError(f"config.{key}={name!r}: allowed are {', '.join(allowed)}")
    return tuple(dict.fromkeys(names))


def profiled_steps(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The first and last step of `log.profile`; None for none.

    Raises:
        UserError: it is not a pair of steps of the run.
    """
    value, steps = config["log"]["profile"], config["train"]["steps"]
    pair = tuple(value) if isinstance(value, tuple | list) else (value,)
    if pair in ((), (0, 0)):
        return None
    if [type(step) for step in pair] != [int, int] or not 1 <= pair[0] <= pair[1] <= steps:
        raise UserError(
            f"config.log.profile={value!r}: must be first,last, as 100,105, or () for no trace, "
            f"with 1 <= first <= last <= train.steps={steps}"
        )
    return pair


def check_keys(names: Iterable[str]) -> None:
    """Raises UserError for the first name, such as "train.steps", that is not a key."""
    for name in names:
        if name in KEYS:
            continue
        if near := difflib.get_close_matches(name, KEYS, n=1, cutoff=0.8):
            raise UserError(f"config.{name}: no such key; did you mean config.{near[0]}?")
        section = name.rpartition(".")[0]
        siblings = sorted(k for k in KEYS if section and k.startswith(f"{section}."))
        allowed = siblings or sorted({key.split(".")[0] for key in KEYS})
        raise UserError(f"config.{name}: no such key; there are {', '.join(allowed)}")


def validate(config: ConfigDict) -> None:
    """Checks every value that can be checked without reading a file.

    Raises:
        UserError: names the first key that is unknown, missing or out of range, and what is
            allowed.
    """
    values = flatten_config(config)
    check_keys(values)
    for name, key in KEYS.items():
        if name not in values:
            raise UserError(f"config.{name}: missing; start from vop_jax.config.base.base_config()")
        key.check(f"config.{name}", values[name])
    _check_data(config)
    if config.train.select == "best":
        _check_selection(config)
    attention, mesh = config.compute.attention, config.mesh
    if attention in ON_CUDA and config.compute.dtype == "float32":
        raise UserError(
            f"config.compute.attention={attention!r} needs config.compute.dtype='bfloat16'"
        )
    if mesh.data == 0 or mesh.data < -1:
        raise UserError(f"config.mesh.data={mesh.data}: a number of devices, or -1")
    extra_rows(config)
    trackers(config)
    profiled_steps(config)


def _check_data(config: ConfigDict) -> None:
    scale, widths = config.data.crop_scale, config.data.text_buckets
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(
            f"config.data.crop_scale={scale}: must be (low, high), 0 < low <= high <= 1"
        )
    is_list = isinstance(widths, tuple | list)
    if not is_list or not all(type(width) is int and width >= 2 for width in widths):
        raise UserError(
            f"config.data.text_buckets={widths!r}: must be a tuple of whole numbers, 2 or more, "
            "such as (32,), or ()"
        )
    if config.data.sampling == "rand" and not config.data.stored_fps:
        raise UserError(
            "config.data.sampling='rand' needs frames to choose from: set data.stored_fps > 0"
        )


def _check_selection(config: ConfigDict) -> None:
    """Checks what `train.select=best` needs."""
    data = config.data
    if not config.train.eval_every:
        raise UserError("config.train.select='best' needs config.train.eval_every > 0")
    for split, why in (("eval", "spoil the evaluation"), ("train", "choose what fits it best")):
        if data.val_split == data[f"{split}_split"]:
            raise UserError(
                f"config.data.val_split={data.val_split!r} is the {split} split: "
                f"choosing a checkpoint on it would {why}"
            )
    if data.val_share and data.train_split == data.eval_split:
        raise UserError(
            f"config.data.val_share: data.train_split={data.train_split!r} is the eval split, "
            "none of it can be held out"
        )


def first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignored: Collection[str] = RESUMABLE
) -> tuple[str, Any, Any] | None:
    """The first key in which two configs differ: (key, our value, their value)."""
    a, b = _with_defaults(ours), _with_defaults(theirs)
    for name in a | b:
        left, right = (list(v) if isinstance(v, tuple) else v for v in (a.get(name), b.get(name)))
        if name not in ignored and left != right:
            return name, left, right
    return None
