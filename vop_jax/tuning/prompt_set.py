"""A trained set of prompts on disk: small, and bound to the CLIP it was trained over.

A safetensors file, or an orbax folder of the same content.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.storage import tensors
from vop_jax.tuning.methods import MethodConfig

FORMAT = "vop_jax.prompts"


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """What `load_prompts` reads.

    Attributes:
        params: the trained subtree, e.g. {"prompts": {"visual": [L, P, D], "text": …}}.
        method: the method and its sizes.
        clip_fingerprint, clip_name: the CLIP they were trained over.
        clip_config: its sizes.
        video: how clips were read in training (`frames`, `short_side`, `stored_fps`), or {}.
    """

    params: dict[str, Any]
    method: MethodConfig
    clip_fingerprint: str
    clip_name: str
    clip_config: ClipConfig
    video: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256: equal exactly when parameters, method and the way clips are read are."""
        facts = [dataclasses.asdict(self.method), self.video, tensors.fingerprint(self.params)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_prompts(
    path: str | os.PathLike,
    params: tensors.Tree,
    *,
    method: MethodConfig,
    clip_fingerprint: str,
    clip_name: str,
    clip_config: ClipConfig,
    video: Mapping[str, Any] | None = None,
) -> None:
    """Writes a trained subtree atomically, with all that is needed to use it again.

    Args:
        path: a safetensors file; if it ends in .orbax, an orbax folder.
    """
    _as_kept(folder=os.fspath(path).endswith(".orbax")).save(
        path,
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(params)),
        {
            "format": FORMAT,
            "method": method.name,
            "method_config": json.dumps(dataclasses.asdict(method)),
            "clip_fingerprint": clip_fingerprint,
            "clip_name": clip_name,
            "clip_config": json.dumps(clip_config.to_dict()),
            "activation": clip_config.activation,
            "video": json.dumps(dict(video or {})),
        },
    )


def load_prompts(path: str | os.PathLike) -> PromptSet:
    """Reads what `save_prompts` wrote.

    Raises:
        UserError: no such file, or not a file of prompts.
    """
    params, metadata = _as_kept(folder=epath.Path(path).is_dir()).load(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a prompts file; --mode=export writes one")
    try:
        return PromptSet(
            params=params,
            method=MethodConfig.from_mapping(json.loads(metadata["method_config"])),
            clip_fingerprint=metadata["clip_fingerprint"],
            clip_name=metadata["clip_name"],
            clip_config=ClipConfig(**json.loads(metadata["clip_config"])),
            video=dict(json.loads(metadata["video"])),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata is not a prompts file's ({error!r})") from None


def _as_kept(*, folder: bool) -> Any:
    """The module that saves and loads; orbax takes seconds to import."""
    if not folder:
        return tensors
    from vop_jax.storage import tree_folder

    return tree_folder


def check_same_clip(
    where: str | os.PathLike, prompts: PromptSet, fingerprint: str, name: str, config: ClipConfig
) -> None:
    """Raises UserError, naming both, when the prompts were trained over another CLIP.

    Another activation or number of heads makes another CLIP of the same parameters.
    """
    if prompts.clip_fingerprint != fingerprint:
        raise UserError(
            f"{where}: prompts were trained over {prompts.clip_name}, not over the given {name}"
        )
    theirs = prompts.clip_config.to_dict()
    for key, value in config.to_dict().items():
        if theirs[key] != value:
            raise UserError(
                f"{where}: prompts were trained over a CLIP with {key}={theirs[key]!r}; that of "
                f"the given {name} is {value!r}"
            )
