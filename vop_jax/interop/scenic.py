"""Use of vop_jax with scenic (github.com/google-research/scenic): CLIP weights, datasets, runs.

python -m vop_jax.interop.scenic --config=scenic/vop_demo --workdir=DIR

requirements-scenic.txt installs scenic; it is imported only where it is used.
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

SOURCE = "scenic's CLIP"  # in messages


def import_scenic(module: str) -> Any:
    """A module of scenic.

    Raises:
        UserError: scenic is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module}: {error}; pip install --no-deps -r requirements-scenic.txt "
            "(`scenic` on PyPI is another project)"
        ) from None


def to_scenic(params: Tree, *, underscores: bool = False) -> dict[str, Any]:
    """Renames the parameters of `clip.model.Clip` to those of scenic's `layers.CLIP`; no copies.

    Args:
        underscores: for a model with use_underscore_module_name=True.

    Raises:
        UserError: they are not the parameters of a complete CLIP.
    """
    params = from_scenic(params)
    return _rename(params, r"resblocks\.(\d+)", r"resblocks_\1") if underscores else params


def from_scenic(params: Tree) -> dict[str, Any]:
    """Renames the parameters of scenic's `layers.CLIP` to those of `clip.model.Clip`; no copies.

    Args:
        params: with either naming of the blocks; of `load_model_vars`, the entry "params".

    Raises:
        UserError: they are not the parameters of a complete CLIP with a ViT.
    """
    renamed = _rename(params, r"resblocks_(\d+)", r"resblocks.\1")
    check_shapes(SOURCE, renamed, parameter_shapes(sizes_of(renamed)))
    return renamed


def _rename(params: Tree, pattern: str, name: str) -> dict[str, Any]:
    return unflatten({re.sub(pattern, name, key): leaf for key, leaf in flatten(params).items()})


def sizes_of(params: Tree) -> ClipConfig:
    """The config of a CLIP, inferred from shapes; its activation is scenic's, quick_gelu.

    Raises:
        UserError: a parameter is missing whose shape is needed.
    """
    shapes = {name: np.shape(leaf) for name, leaf in flatten(params).items()}

    def count_blocks(tower: str) -> int:
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
            vision_layers=count_blocks("visual"),
            vision_heads=shapes[f"visual/{query}"][0],
            text_width=text_width,
            text_layers=count_blocks("text"),
            text_heads=shapes[f"text/{query}"][0],
            embed_dim=shapes["visual/proj/kernel"][1],
            context_length=shapes["text/positional_embedding"][0],
            vocab_size=vocab_size,
        )
    except KeyError as error:
        raise UserError(
            f"{SOURCE}: tensor {error.args[0]} is missing; allowed are its ViTs, not its ResNets"
        ) from None


def clip_of(config: ClipConfig, *, underscores: bool = False) -> Any:
    """scenic's `layers.CLIP` with the sizes of a config.

    Raises:
        UserError: scenic is not installed, or has no such CLIP.
    """
    if config.vision_mlp or config.text_mlp:
        raise UserError(f"{SOURCE}: its MLPs are always four times as wide as the tower")
    if config.activation != "quick_gelu":
        raise UserError(f"{SOURCE}: its activation is quick_gelu, not {config.activation}")
    return import_scenic("scenic.projects.baselines.clip.layers").CLIP(
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
    """Adds our datasets to scenic's registry as "vop_jax", unless they are there.

    Raises:
        UserError: scenic is not installed.
    """
    registry = import_scenic("scenic.dataset_lib.datasets")
    if scenic_config.DATASET not in registry.DatasetRegistry.list():
        registry.add_dataset(scenic_config.DATASET)(scenic_data.build)


def main(rng: Any, config: ConfigDict, workdir: str, writer: Writer) -> dict[str, Any]:
    """Trains as a project of scenic, for `scenic.app.run(main)`; returns the summary.

    Args:
        rng: not used; all random numbers follow from config.rng_seed.
        config: with scenic's names and ours, see `scenic_config.translate`.

    Raises: as `train.train`.
    """
    from vop_jax.experiment import train

    return train.train(scenic_config.translate(config), workdir, writer)


def _run() -> None:
    """The program: `scenic.app.run` with our exit statuses."""
    from vop_jax import cli
    from vop_jax import main as command_line
    from vop_jax.config.base import shipped_configs
    from vop_jax.training import hosts

    def project(rng: Any, config: ConfigDict, workdir: str, writer: Writer) -> None:
        def work() -> int:
            ours = scenic_config.translate(config)
            return command_line.run(ours, workdir, "train", writer=writer)

        cli.set_up_logging()
        sys.exit(command_line.finish(work))

    def program() -> None:
        app = import_scenic("scenic.app")  # defines the flags config and workdir
        paths = {f"--config={name}": f"--config={path}" for name, path in shipped_configs().items()}
        parts = [argument.partition(":") for argument in sys.argv]
        sys.argv = [paths.get(file, file) + colon + method for file, colon, method in parts]
        hosts.start()  # before scenic looks at the devices
        app.run(project)

    sys.exit(cli.run(program))


if __name__ == "__main__":
    _run()
