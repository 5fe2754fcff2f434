"""AdamW with linear warm-up and cosine decay, both in steps."""

import re

import optax
from ml_collections import ConfigDict

from vop_jax.storage.tensors import Tree, flatten, unflatten

NO_WEIGHT_DECAY = (r".*/(bias|scale)", r".*/logit_scale")  # norms, biases, temperature


def learning_rate(train: ConfigDict) -> optax.Schedule:
    """0 -> train.learning_rate over the first `warmup` share of the steps, then cosine to 0."""
    warmup = round(train.warmup * train.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, warmup, max(train.steps, warmup + 1)
    )


def weight_decay_mask(params: Tree) -> dict:
    """True where weight decay applies."""
    return unflatten(
        {
            name: not any(re.fullmatch(pattern, name) for pattern in NO_WEIGHT_DECAY)
            for name in flatten(params)
        }
    )


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; `train` is the config's section of that name."""
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(learning_rate(train), weight_decay=train.weight_decay, mask=weight_decay_mask),
    )
