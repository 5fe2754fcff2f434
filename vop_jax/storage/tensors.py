"""Parameter trees in safetensors files: flattened with "/", described by string metadata."""

import hashlib
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from vop_jax.errors import UserError
from vop_jax.storage import files

CHECKSUM = "checksum"  # in the metadata

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


def checksum(flat: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """CRC-32 over metadata, names, shapes and bytes: 0.3 s a GB, where SHA-256 takes 0.7 s."""
    stated = sorted((k, v) for k, v in metadata.items() if k != CHECKSUM)
    crc = zlib.crc32(json.dumps(stated).encode())
    for name in sorted(flat):
        leaf = np.ascontiguousarray(flat[name])
        crc = zlib.crc32(f"{name}{leaf.dtype}{leaf.shape}".encode(), crc)
        crc = zlib.crc32(leaf.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def check_finite(where: str | os.PathLike, flat: Mapping[str, np.ndarray]) -> None:
    """Raises UserError naming the first tensor with a NaN or an infinity."""
    for name, leaf in flat.items():
        # Both pass a NaN on; no array of booleans is made.
        if leaf.size and not np.isfinite([leaf.min(), leaf.max()]).all():
            raise UserError(f"{where}: tensor {name} holds numbers that are not finite")


def save(path: str | os.PathLike, tree: Tree, metadata: Mapping[str, str]) -> None:
    """Writes a parameter tree as safetensors, atomically; equal trees give equal files.

    A checksum of all that is written joins the metadata.
    """
    flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten(tree).items()}
    metadata = {**metadata, CHECKSUM: checksum(flat, metadata)}
    with files.replacing(path) as place:
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
        UserError: no such file, not a safetensors file, a tensor with numbers that are not finite,
            or a file that was changed since it was written.
    """
    with _local(path) as local:
        try:
            with safe_open(local, framework="numpy") as file:
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata() or {})
        except (SafetensorError, OSError, AttributeError) as error:  # of a type numpy has not
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    check_finite(path, flat)
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(flat, metadata):
        raise UserError(
            f"{path}: damaged, its checksum is not that of its content; write or copy it anew"
        )
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
        try:  # safetensors says of each file that it may not read that there is none
            open(path, "rb").close()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, "file.safetensors")
        source.copy(copy)
        yield copy
