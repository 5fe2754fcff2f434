"""Parameter trees with string metadata, in safetensors files and in orbax folders.

A safetensors file holds the flattened tree: the names of nested dicts are joined with "/".
"""

import hashlib
import json
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from vop_jax.errors import UserError
from vop_jax.storage import files
from vop_jax.storage.files import StrPath

# Keys of the metadata: of the whole content, and of the part below a top-level name.
CHECKSUM, PART_CHECKSUM = "checksum", "checksum/"
# An orbax folder of this project holds these two; orbax itself writes the others into PARAMS.
PARAMS, METADATA = "params", "metadata.json"
ORBAX_FILES = ("_METADATA", "manifest.ocdbt")

Tree = Mapping[str, Any]  # nested dicts of arrays


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}, sorted by name."""
    flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")  # type: ignore[no-untyped-call]
    return {name: flat[name] for name in sorted(flat)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = traverse_util.unflatten_dict(  # type: ignore[no-untyped-call]
        dict(flat), sep="/"
    )
    return tree


def fingerprint(tree: Tree) -> str:
    """The SHA-256 of names, shapes and float32 values: equal trees have equal fingerprints.

    The same CLIP, converted from two file formats, has one fingerprint.
    """
    digest = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        values = np.asarray(leaf, dtype="<f4", order="C")
        digest.update(f"{name}{values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()


def checksum(flat: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """The CRC-32 of metadata, names, shapes and bytes; twice as fast as SHA-256."""
    described = sorted((k, v) for k, v in metadata.items() if k != CHECKSUM)
    crc = zlib.crc32(json.dumps(described).encode())
    for name in sorted(flat):
        leaf = np.ascontiguousarray(flat[name])
        crc = zlib.crc32(f"{name}{leaf.dtype}{leaf.shape}".encode(), crc)
        crc = zlib.crc32(leaf.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def check_finite(where: StrPath, flat: Mapping[str, np.ndarray]) -> None:
    """Raises UserError naming the first tensor with a NaN or an infinity."""
    for name, leaf in flat.items():
        # min and max propagate a NaN, and need no array of booleans.
        if leaf.size and not np.isfinite([leaf.min(), leaf.max()]).all():
            raise UserError(f"{where}: tensor {name} holds numbers that are not finite")


def save(
    path: StrPath, tree: Tree, metadata: Mapping[str, str], *, part_checksums: bool = False
) -> None:
    """Writes a parameter tree as safetensors, atomically; equal trees give equal files.

    The metadata also gets a checksum of the whole content.

    Args:
        part_checksums: also of each part, so that `load_part` can check one alone.
    """
    flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten(tree).items()}
    metadata = _without_part_checksums(metadata)
    if part_checksums:
        metadata |= {
            f"{PART_CHECKSUM}{part}": checksum(_part(flat, part), metadata) for part in tree
        }
    metadata = {**metadata, CHECKSUM: checksum(flat, metadata)}
    with files.replacing(path) as partial:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        safetensors_numpy.save_file(flat, os.fspath(partial), metadata=metadata)
        partial.chmod(mode)  # the library lets only the owner read it
        _sort_metadata(partial)


def _sort_metadata(path: pathlib.Path) -> None:
    """Rewrites the header of a safetensors file; the library orders the metadata at random."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # true while both write compact JSON
            file.seek(8)
            file.write(text.ljust(size))


def load(path: StrPath) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads what `save` wrote: (tree of numpy arrays, metadata).

    Raises:
        UserError: there is no such file, it is not a safetensors file, a tensor has numbers that
            are not finite, or the file has changed since it was written.
    """
    flat, metadata = _read(path, lambda name: True)
    check_finite(path, flat)
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(flat, metadata):
        raise UserError(
            f"{path}: damaged, its checksum is not that of its content; write or copy it anew"
        )
    try:
        return unflatten(flat), metadata
    except (IndexError, TypeError):
        raise UserError(f"{path}: a tensor lies below the name of another") from None


def _part(flat: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: leaf for name, leaf in flat.items() if name.split("/")[0] == part}


def _without_part_checksums(metadata: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in metadata.items() if not k.startswith(PART_CHECKSUM)}


def has_part_checksums(metadata: Mapping[str, str]) -> bool:
    """Whether `load_part` can read the file of this metadata."""
    return len(_without_part_checksums(metadata)) < len(metadata)


def load_part(path: StrPath, part: str) -> dict[str, np.ndarray]:
    """Reads {"part/b/c": array} of a file that has checksums of its parts.

    Raises:
        UserError: as `load` does, but nothing is known about the other parts.
    """
    flat, metadata = _read(path, lambda name: name.split("/")[0] == part)
    check_finite(path, flat)
    expected = metadata.get(f"{PART_CHECKSUM}{part}")
    if expected != checksum(flat, _without_part_checksums(metadata)):
        raise UserError(
            f"{path}: damaged, the checksum of {part} is not that of its content; write or copy "
            "it anew"
        )
    return flat


def read_shapes(path: StrPath) -> dict[str, tuple[int, ...]]:
    """Reads {"a/b/c": shape} without the tensors; raises UserError as `load` does."""
    with _opened(path) as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def read_metadata(path: StrPath) -> dict[str, str]:
    """Reads the metadata without the tensors; raises UserError as `load` does."""
    return _read(path, lambda name: False)[1]


def _read(path: StrPath, wanted: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors with the wanted names, and the metadata."""
    with _opened(path) as file:
        names = filter(wanted, file.keys())
        flat = {name: file.get_tensor(name) for name in names}
        return flat, dict(file.metadata() or {})


@contextmanager
def _opened(path: StrPath) -> Iterator[Any]:
    with files.local_copy(path, "a safetensors file") as local:
        try:
            with safe_open(local, framework="numpy") as file:
                yield file
        # numpy lacks some types of safetensors, which is an AttributeError.
        except (SafetensorError, OSError, AttributeError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def save_orbax(path: StrPath, tree: Tree, metadata: Mapping[str, str]) -> None:
    """Writes a parameter tree as a folder, atomically.

    `orbax.checkpoint.StandardCheckpointer` restores its subfolder `params`. Other processes of a
    run take no part.
    """
    import orbax.checkpoint as ocp

    values = unflatten({name: np.asarray(leaf) for name, leaf in flatten(tree).items()})
    with files.replacing(path) as folder:
        folder.mkdir()
        (folder / METADATA).write_text(json.dumps(dict(metadata), indent=2) + "\n")
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute() / PARAMS, args=ocp.args.PyTreeSave(values))


def load_orbax(path: StrPath) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads what `save_orbax` wrote: (tree of numpy arrays, metadata).

    Raises:
        UserError: there is no such folder, or it is damaged, or a number in it is not finite.
    """
    import orbax.checkpoint as ocp

    folder = epath.Path(path) if files.is_remote(path) else epath.Path(path).absolute()
    if not (folder / PARAMS).is_dir() or not (folder / METADATA).exists():
        raise UserError(f"{path}: not an orbax folder of this project ({PARAMS}, {METADATA})")
    # Without these, orbax leaves threads behind that print errors when the program ends.
    for name in ORBAX_FILES:
        if not (folder / PARAMS / name).exists():
            raise UserError(f"{path}: not a readable orbax folder (no {PARAMS}/{name})")
    try:
        metadata = json.loads((folder / METADATA).read_text())
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(folder / PARAMS, args=ocp.args.PyTreeRestore())
    except Exception as error:  # orbax raises almost anything about a damaged folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable orbax folder ({reason})") from None
    flat = {name: np.asarray(leaf) for name, leaf in flatten(restored).items()}
    check_finite(path, flat)
    return unflatten(flat), metadata


def _checkpointer() -> Any:
    """An orbax checkpointer of this process alone."""
    import jax
    import orbax.checkpoint as ocp

    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
