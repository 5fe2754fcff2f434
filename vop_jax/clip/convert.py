"""CLIP weights of PyTorch become ours: reading checkpoints of every published kind.

The names and layouts are in `clip.layouts`. torch is needed for its own files only, imported
where they are read, and never told to unpickle anything but tensors.
"""

import contextlib
import dataclasses
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from vop_jax.clip import layouts
from vop_jax.clip.config import ClipConfig
from vop_jax.clip.download import sha256
from vop_jax.clip.released import PROMPTS, check_prompts, import_torch, split
from vop_jax.clip.source_config import Told, choose_heads, read_config, settle
from vop_jax.errors import UserError

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a checkpoint holds.

    Attributes:
        params: the parameter tree of `clip.model.Clip`, float32.
        config: sizes read off the tensors; heads and activation as `convert` says.
        prompts: of a released VoP checkpoint, {"visual": [L, P, D], "text": [L, P, D]}.
        sha256: of the file.
        assumed: what neither the file nor the caller told, one sentence each.
    """

    params: dict[str, Any]
    config: ClipConfig
    prompts: dict[str, np.ndarray] | None
    sha256: str
    assumed: tuple[str, ...]


def convert(
    path: str | os.PathLike,
    *,
    activation: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> Converted:
    """Reads a checkpoint of OpenAI, open_clip, Hugging Face or the released VoP.

    Heads and activation come from the config beside the file (`config.json` of Hugging Face,
    `open_clip_config.json`), else from the arguments, else heads = max(1, width // 64) and
    quick_gelu. OpenAI's archives and the released VoP are known to be quick_gelu.

    Raises:
        UserError: a file that is not a checkpoint, one with Python objects in it, tensors that
            are missing, misshapen or unexpected, or an argument that the config contradicts.
    """
    with _local(path) as local:
        digest = sha256(local)
        tensors, archive = read_tensors(path, local)
    tensors = _without_wrappers(path, tensors)
    prompts = None
    if released := not PROMPTS.isdisjoint(tensors):
        tensors, prompts = split(path, tensors)
    elif any(name.startswith("text.") for name in tensors):  # open_clip's CustomTextCLIP
        tensors = _without_prefix(path, tensors, "text.")
    layout = layouts.layout_of(path, tensors)
    if archive or released:
        told = Told("a TorchScript archive" if archive else "the released VoP", "quick_gelu")
    else:
        told = read_config(path, layout)
    assumed = []
    if not (told.activation or activation):
        assumed.append(
            f"nothing tells the activation of {path}: quick_gelu, as OpenAI's; if it was trained "
            "with gelu, as open_clip's LAION models, pass --activation=gelu"
        )
    sizes = layouts.read_sizes(path, tensors, layout)
    config = ClipConfig(
        **sizes,  # type: ignore[arg-type]
        activation=settle("activation", activation, told.activation, told.by) or "quick_gelu",
        vision_heads=choose_heads(path, "vision", sizes["vision_width"], vision_heads, told),
        text_heads=choose_heads(path, "text", sizes["text_width"], text_heads, told),
    )
    params = layouts.to_flax(path, tensors, layout, config)
    if prompts is not None:
        check_prompts(path, prompts, config)
    return Converted(params, config, prompts, digest, tuple(assumed))


def read_tensors(path: str | os.PathLike, local: str) -> tuple[layouts.Tensors, bool]:
    """The tensors of a file by name, and whether it is a TorchScript archive.

    Args:
        path: how messages call it.
        local: where it lies on this machine.

    Raises:
        UserError: neither safetensors nor a PyTorch file of tensors alone.
    """
    with open(local, "rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":  # after the header's length
        try:
            loaded = safetensors_numpy.load_file(local)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        # numpy has no bfloat16 of its own; its kind is that of raw bytes.
        return {k: v.astype("f4") if v.dtype.kind == "V" else v for k, v in loaded.items()}, False
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise UserError(
            f"{path}: neither safetensors nor a PyTorch file (it starts with {start!r})"
        )
    archive = _is_torchscript(local)
    state = _load_torch(path, local, archive)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors")
    tensors = {}
    for name, value in state.items():
        if not hasattr(value, "detach"):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        try:
            value = value.detach()
            tensors[str(name)] = (value.float() if value.is_floating_point() else value).numpy()
        except (TypeError, RuntimeError, NotImplementedError) as error:
            why = str(error).split("\n")[0]
            raise UserError(f"{path}: {name} is not a plain tensor ({why})") from None
    return tensors, archive


def _is_torchscript(local: str) -> bool:
    if not zipfile.is_zipfile(local):
        return False
    try:
        with zipfile.ZipFile(local) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except zipfile.BadZipFile:
        return False  # torch says what is wrong with it


def _load_torch(path: str | os.PathLike, local: str, archive: bool) -> Any:
    torch = import_torch(f"{path}: reading PyTorch files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about old formats
            if archive:
                return torch.jit.load(local, map_location="cpu").state_dict()
            return torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = str(error).replace("WeightsUnpickler error:", "").split("\n")
        reason = next((line.strip() for line in detail[1:] if line.strip()), detail[0].strip())
        raise UserError(
            f"{path}: truncated, or holds Python objects other than tensors, which are never "
            f"loaded ({reason}); save its state_dict alone"
        ) from None
    except Exception as error:  # of a broken file torch raises almost anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(". ")[0]
        raise UserError(f"{path}: not a readable PyTorch file ({reason})") from None


def _without_wrappers(path: str | os.PathLike, tensors: layouts.Tensors) -> layouts.Tensors:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = _without_prefix(path, tensors, prefix)
    return tensors


def _without_prefix(
    path: str | os.PathLike, tensors: layouts.Tensors, prefix: str
) -> layouts.Tensors:
    """`prefix` taken off the names that have it."""
    shorter = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if len(shorter) < len(tensors):
        raise UserError(f"{path}: some tensors are there both with and without {prefix!r}")
    return shorter


@contextlib.contextmanager
def _local(path: str | os.PathLike) -> Iterator[str]:
    """The file on this machine: itself, or a temporary copy of a remote one."""
    source = epath.Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such file")
    if source.is_dir():
        raise UserError(f"{path}: is a directory, not a checkpoint")
    if not source.stat().length:
        raise UserError(f"{path}: is empty")
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, source.name)
        source.copy(copy)
        yield copy
