"""Parameter trees in safetensors files: flattened with "/", described by string metadata."""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from vop_jax import atomic
from vop_jax.errors import UserError

Tree = Mapping[str, Any]  # nested dicts of arrays


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}, sorted by name."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {name: flat[name] for name in sorted(flat)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def fingerprint(tree: Tree) -> str:
    """SHA-256 over names, shapes and float32 values: equal exactly when the parameters are.

    The same CLIP converted from two file formats has one fingerprint.
    """
    digest = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        values = np.asarray(leaf, dtype="<f4", order="C")
        digest.update(f"{name}{values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()


def save(path: str | os.PathLike, tree: Tree, metadata: Mapping[str, str]) -> None:
    """Writes a parameter tree as safetensors, atomically; equal trees give equal files."""
    flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten(tree).items()}
    with atomic.replacing(path) as place:
        _write(os.fspath(place), flat, metadata)


def _write(path: str, flat: dict[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    with open(path, "wb") as empty:
        mode = os.fstat(empty.fileno()).st_mode
    safetensors_numpy.save_file(flat, path, metadata=dict(metadata))
    os.chmod(path, stat.S_IMODE(mode))  # the library's own is for the owner's eyes only
    # The library writes metadata in a random order; the same header, sorted, takes its place.
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # always, while both write compact JSON
            file.seek(8)
            file.write(text.ljust(size))


def load(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads what `save` wrote: (tree of numpy arrays, metadata).

    Raises:
        UserError: no such file, or not a safetensors file.
    """
    with _local(path) as local:
        try:
            with safe_open(local, framework="numpy") as file:
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata() or {})
        except (SafetensorError, OSError, AttributeError) as error:  # of a type numpy has not
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        return unflatten(flat), metadata
    except (IndexError, TypeError):
        raise UserError(f"{path}: a tensor lies below the name of another") from None


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata alone, without reading tensors; errors as in `load`."""
    with _local(path) as local:
        try:
            with safe_open(local, framework="numpy") as file:
                return dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None


@contextmanager
def _local(path: str | os.PathLike) -> Iterator[str]:
    """The file on this machine: itself, or a temporary copy of a remote one."""
    source = epath.Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such file")
    if source.is_dir():
        raise UserError(f"{path}: is a directory, not a safetensors file")
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, "file.safetensors")
        source.copy(copy)
        yield copy
