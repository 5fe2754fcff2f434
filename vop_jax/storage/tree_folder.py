"""Parameter trees in orbax folders, with the same calls as `tensorfile`."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vop_jax.errors import UserError
from vop_jax.storage import files
from vop_jax.storage.tensors import Tree, check_finite, flatten

PARAMS, METADATA = "params", "metadata.json"
ORBAX_OWN = ("_METADATA", "manifest.ocdbt")  # in PARAMS


def save(path: str | os.PathLike, tree: Tree, metadata: Mapping[str, str]) -> None:
    """Writes a parameter tree as a folder; one that is there is replaced.

    `params` in it is what `orbax.checkpoint.StandardCheckpointer` restores. For one process:
    those beside it neither write nor wait.
    """
    values = jax.tree.map(np.asarray, dict(tree))
    with files.replacing(path) as folder:
        folder.mkdir()
        (folder / METADATA).write_text(json.dumps(dict(metadata), indent=2) + "\n")
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute() / PARAMS, args=ocp.args.PyTreeSave(values))


def load(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads what `save` wrote: (tree of numpy arrays, metadata).

    Raises:
        UserError: no such folder, not such a one, or numbers in it that are not finite.
    """
    folder = epath.Path(path) if "://" in os.fspath(path) else epath.Path(path).absolute()
    if not (folder / PARAMS).is_dir() or not (folder / METADATA).exists():
        raise UserError(f"{path}: not an orbax folder of this project ({PARAMS}, {METADATA})")
    # Missed by orbax itself, they leave reads behind that complain when all is over.
    for name in ORBAX_OWN:
        if not (folder / PARAMS / name).exists():
            raise UserError(f"{path}: not a readable orbax folder (no {PARAMS}/{name})")
    try:
        metadata = json.loads((folder / METADATA).read_text())
        with _checkpointer() as checkpointer:
            params = checkpointer.restore(folder / PARAMS, args=ocp.args.PyTreeRestore())
    except Exception as error:  # of a torn folder orbax raises almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable orbax folder ({reason})") from None
    params = jax.tree.map(np.asarray, params)
    check_finite(path, flatten(params))
    return params, metadata


def _checkpointer() -> ocp.Checkpointer:
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
