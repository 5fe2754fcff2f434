"""The tensors of a checkpoint by name: from safetensors, in one file or shards, or from PyTorch.

torch is needed for its own files only, is imported where they are read, and unpickles nothing but
tensors.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from vop_jax.clip.convert.layouts import Tensors
from vop_jax.clip.convert.vop_checkpoint import import_torch
from vop_jax.errors import UserError
from vop_jax.storage import files
from vop_jax.storage.files import StrPath

# Of DataParallel and DeepSpeed, torch.compile, Lightning, and a model that holds a CLIP.
PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")
# Where a checkpoint stores its weights, and where their running average.
WEIGHTS = ("state_dict", "model", "module", "model_state_dict")
AVERAGE = re.compile(r"(.*_)?(ema|swa|averaged?|avg|shadow)(_.*)?", re.IGNORECASE)


@dataclasses.dataclass
class StateDict:
    """The tensors of a checkpoint.

    Attributes:
        tensors: by name, without `PREFIXES`; float32 where NumPy lacks the type.
        sha256: of the file, or of the hashes of its shards.
        torchscript: the file is a TorchScript archive.
        notes: averages in the file that were not taken, one sentence each.
    """

    tensors: Tensors
    sha256: str
    torchscript: bool = False
    notes: tuple[str, ...] = ()


def read(path: StrPath, *, ema: bool = False) -> StateDict:
    """Reads a checkpoint, or the shards that its index (`….index.json`) names.

    Args:
        ema: takes the running average of the weights instead of the weights.

    Raises:
        UserError: the file is not a checkpoint of tensors only, or has no such average.
    """
    name = os.path.basename(os.fspath(path))
    if name.endswith(".index.json"):
        state = _read_shards(path, ema)
    elif (shard := re.search(r"-\d+-of-0*(\d+)\.\w+$", name)) and shard[1] != "1":
        raise UserError(
            f"{path}: is one of {shard[1]} shards; give the index beside it, which ends in "
            ".index.json"
        )
    else:
        state = _read_file(path, ema)
    state.tensors = _without_prefixes(path, state.tensors)
    return state


def _read_shards(path: StrPath, ema: bool) -> StateDict:
    with files.local_copy(path) as local:
        try:
            with open(local, encoding="utf-8") as file:
                shards = {str(k): str(v) for k, v in json.load(file)["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not an index of shards ({error!r})") from None
    if not shards:
        raise UserError(f"{path}: an index of no tensors")
    tensors: Tensors = {}
    digests = ""
    for shard in sorted({*shards.values()}):
        if os.path.basename(shard) != shard:
            raise UserError(f"{path}: the shard {shard!r} is not a file beside it")
        part = epath.Path(path).parent / shard
        state = _read_file(part, ema)
        listed = {name for name, file_name in shards.items() if file_name == shard}
        if different := sorted(listed ^ state.tensors.keys()):
            where = "only in the index" if different[0] in listed else "not in the index"
            raise UserError(f"{part}: tensor {different[0]} is {where}, {path}")
        tensors |= state.tensors
        digests += state.sha256
    return StateDict(tensors, hashlib.sha256(digests.encode()).hexdigest())


def _read_file(path: StrPath, ema: bool) -> StateDict:
    with files.local_copy(path, "a checkpoint; give the file in it") as local:
        with open(local, "rb") as file:
            start = file.read(16)
        torchscript = False
        if not start:
            raise UserError(f"{path}: is empty")
        if start[8:9] == b"{":  # after the header's length
            content = _load_safetensors(path, local)
        elif start.startswith((b"PK\x03\x04", b"\x80")):
            torchscript = _is_torchscript(path, local)
            content = _load_torch(path, local, torchscript)
        else:
            raise UserError(
                f"{path}: neither safetensors nor a PyTorch file (it starts with {start!r}); "
                "unpack an archive; download the file itself instead of a web page or a Git LFS "
                "pointer"
            )
        state, notes = _unwrap(path, content, ema)
        tensors = {str(name): _as_numpy(path, name, value) for name, value in state.items()}
        return StateDict(tensors, files.sha256(local), torchscript, notes)


def _load_safetensors(path: StrPath, local: str) -> dict[str, np.ndarray]:
    try:
        return safetensors_numpy.load_file(local)
    except AttributeError as error:
        raise UserError(
            f"{path}: tensors of a type that NumPy lacks ({error}); save them as float32"
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); copy it again"
        ) from None


def _is_torchscript(path: StrPath, local: str) -> bool:
    """Whether a PyTorch file is a TorchScript archive.

    Raises:
        UserError: a part of it does not match its checksum, which torch does not check.
    """
    try:
        with zipfile.ZipFile(local) as file:
            damaged = file.testzip()
            has_checksum = damaged is not None and file.getinfo(damaged).CRC  # some write 0
            torchscript = any(name.endswith("/constants.pkl") for name in file.namelist())
    except Exception:  # not a zip file, or a broken one; torch reports what is wrong
        return False
    if has_checksum:
        raise UserError(f"{path}: damaged, {damaged} in it does not match its checksum")
    return torchscript


def _load_torch(path: StrPath, local: str, torchscript: bool) -> Any:
    torch = import_torch(f"{path}: reading PyTorch files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old formats
            if torchscript:
                return torch.jit.load(local, map_location="cpu").state_dict()
            return torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        content = f"holds {name[1]}: " if name else "truncated, or holds "
        raise UserError(
            f"{path}: {content}Python objects other than tensors, which are never loaded; save its "
            "state_dict only"
        ) from None
    except Exception as error:  # torch raises almost anything for a broken file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(". ")[0]
        raise UserError(f"{path}: not a readable PyTorch file ({reason}); copy it again") from None


def _unwrap(path: StrPath, content: Any, ema: bool) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """(the state dict inside the content of a file, notes on averages that were not taken)."""
    notes, is_average = [], False
    while True:
        if not isinstance(content, Mapping) or not content:
            kind = type(content).__name__
            raise UserError(f"{path}: holds a {kind}, not a state dict of tensors")
        content = _split_average(path, content)
        nested = [key for key, value in content.items() if isinstance(value, Mapping)]
        weights = [key for key in WEIGHTS if key in nested]
        averages = [key for key in nested if AVERAGE.fullmatch(str(key))]
        if ema and averages:
            if len(averages) > 1:
                raise UserError(
                    f"--ema: {path} holds {', '.join(averages)}; save one of them alone"
                )
            content, is_average = content[averages[0]], True
        elif len(weights) == 1:
            notes += [f"{path} also holds {key}, an average; --ema takes it" for key in averages]
            content = content[weights[0]]
        else:
            break
    if ema and not is_average:
        raise UserError(f"--ema: {path} holds no average, such as model_ema, averaged_model or swa")
    if nested:
        raise UserError(
            f"{path}: holds {', '.join(map(str, content))}"[:200] + "; the weights must be under "
            f"one of {', '.join(WEIGHTS)}{', or with --ema ' + averages[0] if averages else ''}"
        )
    return content, tuple(notes)


def _split_average(path: StrPath, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Splits a flat state dict of a model and its average into two; others are returned as is."""
    groups: dict[str, dict[str, Any]] = {WEIGHTS[0]: {}}
    for name, value in _without_prefixes(path, {str(k): v for k, v in state.items()}).items():
        prefix, dot, rest = name.partition(".")
        if dot and AVERAGE.fullmatch(prefix):
            groups.setdefault(prefix, {})[rest] = value
        else:
            groups[WEIGHTS[0]][name] = value
    return groups if len(groups) > 1 else state


def _as_numpy(path: StrPath, name: Any, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):  # NumPy has no bfloat16 of its own: its kind is V
        return value.astype("f4") if value.dtype.kind == "V" else value
    if not hasattr(value, "detach"):
        raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
    try:
        value = value.detach()
        return (value.float() if value.is_floating_point() else value).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: {name} is not a plain tensor ({reason})") from None


def _without_prefixes(path: StrPath, tensors: dict[str, Any]) -> dict[str, Any]:
    # `n_averaged` is a count of PyTorch's AveragedModel, whose other names start with "module.".
    tensors = {name: value for name, value in tensors.items() if name != "n_averaged"} or tensors
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = without_prefix(path, tensors, prefix)
    # torch.compile of a submodule leaves its mark inside the names.
    return {name.replace("._orig_mod.", "."): value for name, value in tensors.items()}


def without_prefix(path: StrPath, tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors with `prefix` removed from the names that have it."""
    renamed = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError(f"{path}: some tensors exist both with and without {prefix!r}")
    return renamed
