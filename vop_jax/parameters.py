"""How many parameters each method trains, from shapes alone."""

import dataclasses

from ml_collections import ConfigDict

from vop_jax import start
from vop_jax.clip.weights import load_clip
from vop_jax.config import base as configs
from vop_jax.config.clip import ClipConfig
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.tuning import partition
from vop_jax.tuning.methods import METHODS, MethodConfig


def count_parameters(config: ConfigDict) -> dict[str, dict[str, float]]:
    """{method: {"trainable", "paper", "percent"}} at the config's CLIP size.

    `paper` and `percent` follow the paper's way of counting, see `tuning.methods`.
    """
    configs.validate(config)
    if config.init.clip:
        clip = load_clip(config.init.clip).config
    else:
        clip = start.preset(config, default="ViT-B/32")
    counts = {}
    for name in METHODS:
        method = dataclasses.replace(start.method_of(config), name=name)
        method.validate()
        method.check_fits(clip)
        true, paper = count(clip, method)
        counts[name] = {"trainable": true, "paper": paper}
    whole = counts["full"]["paper"]
    return {name: {**c, "percent": 100 * c["paper"] / whole} for name, c in counts.items()}


def count(clip: ClipConfig, method: MethodConfig) -> tuple[int, int]:
    """(trained parameters, those the paper's convention counts), from shapes alone."""
    params = tensors.unflatten(TextVideoModel(clip, method).shapes())
    trainable, _ = partition.split(params, method.trainable_patterns(clip))
    return partition.count(trainable), partition.count(trainable, method.parts.paper_factors)


def format_counts(counts: dict[str, dict[str, float]]) -> str:
    rows = [f"{'method':<14}{'trainable':>14}{'paper':>14}{'percent':>10}"]
    rows += [
        f"{name:<14}{c['trainable']:>14,}{c['paper']:>14,}{c['percent']:>9.3f}%"
        for name, c in counts.items()
    ]
    return "\n".join(rows)
