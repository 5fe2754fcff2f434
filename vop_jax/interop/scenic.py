"""scenic (github.com/google-research/scenic): its CLIP, its dataset registry, its projects.

python -m vop_jax.interop.scenic --config=configs/scenic/vop_demo.py --workdir=DIR

Nothing of scenic is imported before it is needed; requirements-scenic.txt brings it.
"""

import importlib
import re
import sys
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vop_jax.clip.weights import check_shapes, parameter_shapes
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.interop import scenic_config, scenic_data
from vop_jax.storage.tensors import Tree, flatten, unflatten
from vop_jax.training.writer import Writer

WHERE = "scenic's CLIP"


def imported(module: str) -> Any:
    """A module of scenic.

    Raises:
        UserError: it is not there; tells how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module}: {error}; pip install --no-deps -r requirements-scenic.txt "
            "(`scenic` on PyPI is another project)"
        ) from None


def to_scenic(params: Tree, *, underscores: bool = False) -> dict[str, Any]:
    """The parameters of `clip.model.Clip` -> those of scenic's `layers.CLIP`, the same arrays.

    Args:
        underscores: for a model with use_underscore_module_name=True.

    Raises:
        UserError: they are not a whole CLIP's.
    """
    params = from_scenic(params)
    return _renamed(params, r"resblocks\.(\d+)", r"resblocks_\1") if underscores else params


def from_scenic(params: Tree) -> dict[str, Any]:
    """The parameters of scenic's `layers.CLIP` -> those of `clip.model.Clip`; the inverse.

    Both namings of its blocks are known; of `load_model_vars` it is the entry "params".

    Raises:
        UserError: they are not those of a whole CLIP with a ViT.
    """
    renamed = _renamed(params, r"resblocks_(\d+)", r"resblocks.\1")
    check_shapes(WHERE, renamed, parameter_shapes(sizes_of(renamed)))
    return renamed


def _renamed(params: Tree, pattern: str, name: str) -> dict[str, Any]:
    return unflatten({re.sub(pattern, name, key): leaf for key, leaf in flatten(params).items()})


def sizes_of(params: Tree) -> ClipConfig:
    """What the shapes of a CLIP tell: all but the activation, which is quick_gelu in scenic.

    Raises:
        UserError: a parameter that tells a size is missing.
    """
    shapes = {name: np.shape(leaf) for name, leaf in flatten(params).items()}

    def blocks(tower: str) -> int:
        pattern = rf"{tower}/transformer/resblocks\.(\d+)/"
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    try:
        patch, _, _, vision_width = shapes["visual/conv1/kernel"]
        positions, _ = shapes["visual/positional_embedding"]
        vocab_size, text_width = shapes["text/token_embedding/embedding"]
        query = "transformer/resblocks.0/attn/query/bias"  # [H, D/H]
        return ClipConfig(
            image_size=round((positions - 1) ** 0.5) * patch,
            patch_size=patch,
            vision_width=vision_width,
            vision_layers=blocks("visual"),
            vision_heads=shapes[f"visual/{query}"][0],
            text_width=text_width,
            text_layers=blocks("text"),
            text_heads=shapes[f"text/{query}"][0],
            embed_dim=shapes["visual/proj/kernel"][1],
            context_length=shapes["text/positional_embedding"][0],
            vocab_size=vocab_size,
        )
    except KeyError as error:
        raise UserError(
            f"{WHERE}: tensor {error.args[0]} is missing; allowed are its ViTs, not its ResNets"
        ) from None


def clip_of(config: ClipConfig, *, underscores: bool = False) -> Any:
    """scenic's `layers.CLIP` of these sizes.

    Raises:
        UserError: scenic is not there, or has no such CLIP.
    """
    if config.vision_mlp or config.text_mlp:
        raise UserError(f"{WHERE}: its MLPs are four times as wide as the tower")
    if config.activation != "quick_gelu":
        raise UserError(f"{WHERE}: its activation is quick_gelu, not {config.activation}")
    return imported("scenic.projects.baselines.clip.layers").CLIP(
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        text_features=config.text_width,
        text_num_layers=config.text_layers,
        text_num_heads=config.text_heads,
        vision_features=config.vision_width,
        vision_num_layers=config.vision_layers,
        vision_head_dim=config.vision_width // config.vision_heads,
        vision_patch_size=config.patch_size,
        use_underscore_module_name=underscores,
    )


def register_dataset() -> None:
    """Puts our datasets into scenic's registry, as "vop_jax"; again does nothing.

    Raises:
        UserError: scenic is not there.
    """
    registry = imported("scenic.dataset_lib.datasets")
    if scenic_config.DATASET not in registry.DatasetRegistry.list():
        registry.add_dataset(scenic_config.DATASET)(scenic_data.build)


def main(rng: Any, config: ConfigDict, workdir: str, writer: Writer) -> dict[str, Any]:
    """Our training run as scenic's projects have it: `scenic.app.run(main)`; the summary.

    Args:
        rng: not used; everything is drawn from config.rng_seed, which it is made of.
        config: scenic's names and ours, see `scenic_config.translate`.

    Raises: as `train.train`.
    """
    from vop_jax.experiment import train

    return train.train(scenic_config.translate(config), workdir, writer)


def _run() -> None:
    """The program: `scenic.app.run`, with our exit statuses."""
    from vop_jax import cli
    from vop_jax import main as command_line
    from vop_jax.training import hosts

    def project(rng: Any, config: ConfigDict, workdir: str, writer: Writer) -> None:
        def work() -> int:
            ours = scenic_config.translate(config)
            return command_line.run(ours, workdir, "train", writer=writer)

        cli.set_up_logging()
        sys.exit(command_line.finish(work))

    def program() -> None:
        app = imported("scenic.app")  # defines the flags config and workdir
        hosts.start()  # scenic looks at the devices before it calls us
        app.run(project)

    sys.exit(cli.run(program))


if __name__ == "__main__":
    _run()
