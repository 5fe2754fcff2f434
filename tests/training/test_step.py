"""What a step does to the temperature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vop_jax.clip.model import unit
from vop_jax.training.step import TrainState, loss_and_gradient, make_train_step


class Rows:
    """In place of the model: embeddings are the batch, the temperature is CLIP's."""

    def apply(self, variables, *rows, method):
        if method == "temperature":
            return jnp.exp(variables["params"]["clip"]["logit_scale"])
        return unit(rows[0])


PAIRED = np.eye(4, dtype=np.float32)
SHUFFLED = PAIRED[[1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("videos", "moves"),
    [(SHUFFLED, "down"), (1.05 * PAIRED + SHUFFLED, "up")],
    ids=["wrong pairs", "right pairs"],
)
@pytest.mark.parametrize("start", [4.6052, math.log(100), 0.0])
def test_the_temperature_learns_between_1_and_100(start, videos, moves):
    """Also from where OpenAI's CLIPs are: at the bound, or above it by rounding."""
    batch = {"ids": PAIRED, "frames": videos}
    trainable = {"clip": {"logit_scale": jnp.float32(start)}}
    gradient = loss_and_gradient(Rows(), trainable, {}, batch)[1]["clip"]["logit_scale"]
    assert gradient > 0 if moves == "down" else gradient < 0
    optimizer = optax.sgd(1e4)
    state = TrainState.create(trainable, optimizer)
    state, _ = jax.jit(make_train_step(Rows(), optimizer))(state, {}, batch)
    found = state.trainable["clip"]["logit_scale"]
    assert found.dtype == jnp.float32
    assert found == np.float32(0.0 if moves == "down" else math.log(100))


def test_the_temperature_of_a_frozen_clip_stays_as_it_is():
    optimizer = optax.sgd(0.1)
    state = TrainState.create({"prompts": {"text": jnp.ones(3)}}, optimizer)
    frozen = {"clip": {"logit_scale": jnp.float32(math.log(120))}}
    batch = {"ids": PAIRED, "frames": SHUFFLED}
    state, metrics = jax.jit(make_train_step(Rows(), optimizer))(state, frozen, batch)
    assert metrics["loss"] == pytest.approx(120, rel=1e-5)  # OpenAI's forward pass has no bound
    assert state.trainable.keys() == {"prompts"}
