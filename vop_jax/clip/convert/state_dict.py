"""The tensors of a checkpoint by name: of safetensors, in one file or in shards, or of PyTorch.

torch is needed for its own files only, imported where they are read, and may unpickle nothing but
tensors.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from vop_jax.clip.convert.download import sha256
from vop_jax.clip.convert.layouts import Tensors
from vop_jax.clip.convert.vop_checkpoint import import_torch
from vop_jax.errors import UserError

# Of DataParallel and DeepSpeed, torch.compile, Lightning, and a model that holds a CLIP.
PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")
# Where a checkpoint keeps its weights, and where their running average.
WEIGHTS = ("state_dict", "model", "module", "model_state_dict")
AVERAGE = re.compile(r"(.*_)?(ema|swa|averaged?|avg|shadow)(_.*)?", re.IGNORECASE)


@dataclasses.dataclass
class StateDict:
    """What a checkpoint holds.

    Attributes:
        tensors: by name, without `PREFIXES`; floating-point ones that numpy does not know in
            float32.
        sha256: of the file, or of the hashes of its shards.
        torchscript: it is an archive of TorchScript.
        notes: what it holds that was not taken, one sentence each.
    """

    tensors: Tensors
    sha256: str = ""
    torchscript: bool = False
    notes: tuple[str, ...] = ()


def read(path: str | os.PathLike, *, ema: bool = False) -> StateDict:
    """Reads a checkpoint, or the shards that its index (`….index.json`) names.

    Args:
        ema: its running average of the weights is wanted, not the weights.

    Raises:
        UserError: it is not a checkpoint of tensors alone, or has no such average.
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
        with local_copy(path) as local:
            state = _read_file(path, local, ema)
            state.sha256 = sha256(local)
    state.tensors = _without_prefixes(path, state.tensors)
    return state


def _read_shards(path: str | os.PathLike, ema: bool) -> StateDict:
    with local_copy(path) as local:
        try:
            with open(local, encoding="utf-8") as file:
                owner = {str(k): str(v) for k, v in json.load(file)["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not an index of shards ({error!r})") from None
    if not owner:
        raise UserError(f"{path}: an index of no tensors")
    tensors: Tensors = {}
    digests = ""
    for shard in sorted({*owner.values()}):
        if os.path.basename(shard) != shard:
            raise UserError(f"{path}: the shard {shard!r} is not a file beside it")
        part = epath.Path(path).parent / shard
        with local_copy(part) as local:
            found = _read_file(part, local, ema).tensors
            digests += sha256(local)
        listed = {name for name, place in owner.items() if place == shard}
        if odd := sorted(listed ^ found.keys()):
            where = "only in the index" if odd[0] in listed else "not in the index"
            raise UserError(f"{part}: tensor {odd[0]} is {where}, {path}")
        tensors |= found
    return StateDict(tensors, hashlib.sha256(digests.encode()).hexdigest())


def _read_file(path: str | os.PathLike, local: str, ema: bool) -> StateDict:
    """One file, called `path` in messages and lying at `local`, without its SHA-256."""
    with open(local, "rb") as file:
        start = file.read(16)
    archive = False
    if start[8:9] == b"{":  # after the header's length
        try:
            held: Any = safetensors_numpy.load_file(local)
        except AttributeError as error:
            raise UserError(
                f"{path}: tensors of a type that NumPy has not ({error}); save them as float32"
            ) from None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: not a readable safetensors file ({error}); copy it anew"
            ) from None
    elif start.startswith((b"PK\x03\x04", b"\x80")):
        archive = _is_torchscript(path, local)
        held = _load_torch(path, local, archive)
    else:
        raise UserError(
            f"{path}: neither safetensors nor a PyTorch file (it starts with {start!r}); unpack an "
            "archive, download a web page or a pointer of Git LFS anew as the file itself"
        )
    state, notes = _unwrapped(path, held, ema)
    tensors = {str(name): _as_numpy(path, name, value) for name, value in state.items()}
    return StateDict(tensors, torchscript=archive, notes=notes)


def _unwrapped(
    path: str | os.PathLike, held: Any, ema: bool
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The state dict within what a file holds, and a note on an average that was not taken."""
    notes, taken = [], False
    while True:
        if not isinstance(held, Mapping) or not held:
            raise UserError(f"{path}: holds a {type(held).__name__}, not a state dict of tensors")
        held = _grouped(path, held)
        inner = [key for key, value in held.items() if isinstance(value, Mapping)]
        weights = [key for key in WEIGHTS if key in inner]
        averages = [key for key in inner if AVERAGE.fullmatch(str(key))]
        if ema and averages:
            if len(averages) > 1:
                raise UserError(
                    f"--ema: {path} holds {', '.join(averages)}; save one of them alone"
                )
            held, taken = held[averages[0]], True
        elif len(weights) == 1:
            notes += [f"{path} also holds {key}, an average; --ema takes it" for key in averages]
            held = held[weights[0]]
        else:
            break
    if ema and not taken:
        raise UserError(f"--ema: {path} holds no average, as model_ema, averaged_model or swa")
    if inner:
        raise UserError(
            f"{path}: holds {', '.join(map(str, held))}"[:200] + "; the weights must be under one "
            f"of {', '.join(WEIGHTS)}{', or with --ema ' + averages[0] if averages else ''}"
        )
    return held, tuple(notes)


def _grouped(path: str | os.PathLike, held: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict that holds a model and, under a prefix, its average, as two state dicts."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in _without_prefixes(path, {str(k): v for k, v in held.items()}).items():
        start, dot, rest = name.partition(".")
        if dot and AVERAGE.fullmatch(start):
            groups.setdefault(start, {})[rest] = value
        else:
            groups.setdefault(WEIGHTS[0], {})[name] = value
    return held if groups.keys() == {WEIGHTS[0]} else groups


def _as_numpy(path: str | os.PathLike, name: Any, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):  # numpy has no bfloat16 of its own: its kind is V
        return value.astype("f4") if value.dtype.kind == "V" else value
    if not hasattr(value, "detach"):
        raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
    try:
        value = value.detach()
        return (value.float() if value.is_floating_point() else value).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        why = str(error).split("\n")[0]
        raise UserError(f"{path}: {name} is not a plain tensor ({why})") from None


def _is_torchscript(path: str | os.PathLike, local: str) -> bool:
    """Whether a PyTorch file is an archive of TorchScript.

    Raises:
        UserError: a part of it has another checksum than it states, which torch does not look at.
    """
    try:
        with zipfile.ZipFile(local) as file:
            damaged = file.testzip()
            stated = damaged is not None and file.getinfo(damaged).CRC  # some write 0
            torchscript = any(name.endswith("/constants.pkl") for name in file.namelist())
    except Exception:  # not a zip file, or a broken one, of which torch says what is wrong
        return False
    if stated:
        raise UserError(f"{path}: damaged, {damaged} in it has another checksum than it states")
    return torchscript


def _load_torch(path: str | os.PathLike, local: str, archive: bool) -> Any:
    torch = import_torch(f"{path}: reading PyTorch files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about old formats
            if archive:
                return torch.jit.load(local, map_location="cpu").state_dict()
            return torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {found[1]}: " if found else "truncated, or holds "
        raise UserError(
            f"{path}: {what}Python objects other than tensors, which are never loaded; save its "
            "state_dict alone"
        ) from None
    except Exception as error:  # of a broken file torch raises almost anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(". ")[0]
        raise UserError(f"{path}: not a readable PyTorch file ({reason}); copy it anew") from None


def _without_prefixes(path: str | os.PathLike, tensors: dict[str, Any]) -> dict[str, Any]:
    # A count of PyTorch's AveragedModel, whose other names start with "module.".
    tensors = {name: value for name, value in tensors.items() if name != "n_averaged"} or tensors
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = without_prefix(path, tensors, prefix)
    # torch.compile of a part leaves its mark within the names.
    return {name.replace("._orig_mod.", "."): value for name, value in tensors.items()}


def without_prefix(path: str | os.PathLike, tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """`prefix` taken off the names that have it."""
    shorter = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if len(shorter) < len(tensors):
        raise UserError(f"{path}: some tensors are there both with and without {prefix!r}")
    return shorter


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[str]:
    """The file on this machine: itself, or a temporary copy of a remote one."""
    source = epath.Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such file")
    if source.is_dir():
        raise UserError(f"{path}: is a directory, not a checkpoint; give the file in it")
    if not source.stat().length:
        raise UserError(f"{path}: is empty")
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, source.name)
        source.copy(copy)
        yield copy
