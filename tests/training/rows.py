"""A model of two matrix products in place of CLIP, so that its steps compile at once."""

import itertools
from functools import partial

import jax.numpy as jnp
import numpy as np

from vop_jax.clip.model import unit
from vop_jax.config.base import base_config
from vop_jax.training import sharding
from vop_jax.training.step import TrainState, make_optimizer, make_train_step
from vop_jax.tuning.partition import partition

BATCH = 8


class RowsModel:
    """Unit rows [B, 4] of "frames" [B, 6] and "ids" [B, T]."""

    def apply(self, variables, *rows, method):
        clip, prompts = variables["params"]["clip"], variables["params"]["prompts"]
        if method == "temperature":
            return jnp.exp(clip["logit_scale"])
        x = rows[0].astype(jnp.float32)
        tower = method.removeprefix("encode_")
        return unit(x @ clip[tower][: x.shape[1]] + prompts[tower][None])


def params():
    rng = np.random.default_rng(0)
    clip = {"video": rng.normal(size=(6, 4)), "text": rng.normal(size=(5, 4))}
    clip["logit_scale"] = 4.6052  # as OpenAI's
    prompts = {"video": rng.normal(size=4), "text": rng.normal(size=4)}
    return {
        "clip": {name: np.float32(value) for name, value in clip.items()},
        "prompts": {name: np.float32(value) for name, value in prompts.items()},
    }


def batch(seed, size=BATCH, width=5):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 9, (size, width)).astype(np.int32)
    return {"frames": rng.normal(size=(size, 6)).astype(np.float32), "ids": ids}


def batches(start):
    return (batch(k) for k in itertools.count(start))


def prepare(*shape, steps=6):
    """(mesh, the config's section `train`, make_step, state, frozen).

    Prompts and temperature train; `make_step` takes the number of microbatches.
    """
    mesh, config = sharding.make_mesh(*shape), base_config().train
    config.update(steps=steps, batch_size=BATCH, log_every=2, checkpoint_every=2)
    optimizer = make_optimizer(config)
    trainable, frozen = partition(params(), ["prompts/.*", "clip/logit_scale"])
    state = sharding.place(mesh, TrainState.create(trainable, optimizer))
    make_step = partial(make_train_step, RowsModel(), optimizer, mesh)
    return mesh, config, make_step, state, sharding.place(mesh, frozen)
