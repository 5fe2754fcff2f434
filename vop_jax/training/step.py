"""One step: pure functions of (state, frozen parameters, batch)."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from vop_jax.model import TextVideoModel
from vop_jax.retrieval.losses import symmetric_cross_entropy
from vop_jax.tuning.partition import merge

Batch = dict[str, jax.Array]  # "frames" uint8 [B, F, S, S, 3], "ids" int32 [B, T]
Metrics = dict[str, jax.Array]  # scalars


@flax.struct.dataclass
class TrainState:
    """All that training changes; the frozen CLIP is not in it."""

    step: jax.Array
    trainable: Any
    opt_state: Any

    @classmethod
    def create(cls, trainable: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def batch_loss(model: TextVideoModel, params: Any, batch: Batch) -> jax.Array:
    """The contrastive loss of a global batch of (caption, clip) pairs, a scalar."""
    variables = {"params": params}
    video: Any = model.apply(variables, batch["frames"], method="encode_video")  # [B, E]
    text: Any = model.apply(variables, batch["ids"], method="encode_text")  # [B, E]
    temperature: Any = model.apply(variables, method="temperature")
    return symmetric_cross_entropy(text, video, temperature)


def make_train_step(
    model: TextVideoModel, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """The step `(state, frozen, batch) -> (state, metrics)`, to be jitted by the caller."""

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(trainable):
            return batch_loss(model, merge(trainable, frozen), batch)

        loss, gradient = jax.value_and_grad(loss_of)(state.trainable)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return train_step
