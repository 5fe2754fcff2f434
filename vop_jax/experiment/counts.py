"""Counts of trained parameters, of all methods."""

import dataclasses

from ml_collections import ConfigDict

from vop_jax.clip.weights import ClipFile
from vop_jax.config import base as configs
from vop_jax.config.clip import ClipConfig, preset
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.tuning import methods
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import parameter_count, partition


def count_parameters(config: ConfigDict) -> dict[str, dict[str, float]]:
    """{method: {"trainable", "paper", "percent"}} at the config's CLIP size.

    `paper` and `percent` follow the paper's way of counting, see `tuning.methods`.
    """
    configs.validate(config)
    if config.init.clip:
        clip = ClipFile(config.init.clip).config
    else:
        clip = preset(config, default="ViT-B/32")
    counts = {}
    for name in METHODS:
        method = dataclasses.replace(methods.method_of(config), name=name)
        method.validate()
        method.check_fits(clip)
        true, paper = count(clip, method)
        counts[name] = {"trainable": true, "paper": paper}
    whole = counts["full"]["paper"]
    return {name: {**c, "percent": 100 * c["paper"] / whole} for name, c in counts.items()}


def count(clip: ClipConfig, method: MethodConfig) -> tuple[int, int]:
    """(trained parameters, those the paper's convention counts), from shapes alone."""
    params = tensors.unflatten(TextVideoModel(clip, method).shapes())
    trainable, _ = partition(params, method.trainable_patterns(clip))
    return parameter_count(trainable), parameter_count(trainable, method.parts.paper_factors)


def format_counts(counts: dict[str, dict[str, float]]) -> str:
    """The result of `count_parameters` as a table."""
    rows = [f"{'method':<14}{'trainable':>14}{'paper':>14}{'percent':>10}"]
    rows += [
        f"{name:<14}{c['trainable']:>14,}{c['paper']:>14,}{c['percent']:>9.3f}%"
        for name, c in counts.items()
    ]
    return "\n".join(rows)
