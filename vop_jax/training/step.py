"""One training step: pure functions of (state, frozen parameters, batch)."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vop_jax.clip.remat import join_rows, split_rows
from vop_jax.model import TextVideoModel
from vop_jax.storage.tensors import Tree, flatten, unflatten
from vop_jax.training.sharding import map_rows_for_gradient
from vop_jax.tuning.partition import merge

Batch = dict[str, jax.Array]  # "frames" uint8 [B, F, S, S, 3], "ids" int32 [B, T]
Metrics = dict[str, jax.Array]  # scalars

MAX_LOGIT_SCALE = math.log(100.0)
NO_WEIGHT_DECAY = (r".*/(bias|scale)", r".*/logit_scale")  # norms, biases, temperature


@flax.struct.dataclass
class TrainState:
    """All that training changes; the frozen CLIP is not in it."""

    step: jax.Array
    trainable: Any
    opt_state: Any

    @classmethod
    def create(cls, trainable: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def symmetric_cross_entropy(text: jax.Array, video: jax.Array, temperature: jax.Array) -> jax.Array:
    """CLIP's loss over a batch of pairs, equation (5) of docs/paper.md; row i belongs to row i.

    It is written over the global batch: under `jit` with sharded rows the compiler gathers the
    embeddings, so that every device compares with all negatives.

    Args:
        text, video: unit rows [B, E], float32.
        temperature: scalar, the factor on similarities.

    Returns:
        The mean of text-to-video and video-to-text cross-entropy, a scalar.
    """
    logits = temperature * jnp.matmul(text, video.T, precision=jax.lax.Precision.HIGHEST)
    labels = jnp.arange(logits.shape[0])
    t2v = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    v2t = optax.softmax_cross_entropy_with_integer_labels(logits.T, labels)
    return (t2v.mean() + v2t.mean()) / 2


def embed(model: TextVideoModel, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Unit rows of captions and clips, float32 [B, E] each."""
    variables = {"params": params}
    video: Any = model.apply(variables, batch["frames"], method="encode_video")
    text: Any = model.apply(variables, batch["ids"], method="encode_text")
    return text, video


def embed_in_microbatches(
    model: TextVideoModel, params: Any, batch: Batch, microbatches: int
) -> tuple[jax.Array, jax.Array]:
    """`embed`, one microbatch after the other; only the embeddings [B, E] stay in memory.

    The backward pass embeds each microbatch again and propagates the gradient of the loss with
    respect to its embeddings (GradCache, arXiv 2101.06983). The gradients of microbatches are
    summed in the precision of the parameters.
    """

    @partial(jax.checkpoint, prevent_cse=False)  # in a loop nothing can be merged
    def embed_microbatch(rows: Batch) -> tuple[jax.Array, jax.Array]:
        return embed(model, params, rows)

    rows = jax.tree.map(partial(split_rows, parts=microbatches), batch)
    return jax.tree.map(join_rows, jax.lax.map(embed_microbatch, rows))


def batch_loss(model: TextVideoModel, params: Any, batch: Batch) -> jax.Array:
    """The contrastive loss of a global batch of (caption, clip) pairs, a scalar."""
    return _loss(model, params, *embed(model, params, batch))


def _loss(model: TextVideoModel, params: Any, text: jax.Array, video: jax.Array) -> jax.Array:
    """Unit rows [B, E] of captions and clips -> the loss at the model's temperature, a scalar."""
    temperature: Any = model.apply({"params": params}, method="temperature")
    return symmetric_cross_entropy(text, video, temperature)


def loss_and_gradient(
    model: TextVideoModel,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    mesh: Mesh | None = None,
    microbatches: int = 1,
) -> tuple[jax.Array, Any]:
    """The loss of a batch, a scalar, and its gradient, a tree like `trainable`.

    Args:
        mesh, microbatches: as in `make_train_step`.
    """

    def embed_rows(trainable: Any, frozen: Any, rows: Batch) -> tuple[jax.Array, jax.Array]:
        params = merge(trainable, frozen)
        if microbatches == 1:
            return embed(model, params, rows)
        return embed_in_microbatches(model, params, rows, microbatches)

    embed_all = map_rows_for_gradient(mesh, embed_rows) if mesh else embed_rows

    def loss_of(trainable: Any) -> jax.Array:
        return _loss(model, merge(trainable, frozen), *embed_all(trainable, frozen, batch))

    return jax.value_and_grad(loss_of)(trainable)


def clamp_logit_scale(trainable: Any) -> Any:
    """Clamps a trained logit_scale to [0, ln 100], as in open_clip.

    A bound in the forward pass instead would have no gradient at ln 100, where OpenAI's CLIPs are.
    """
    if "logit_scale" not in trainable.get("clip", {}):
        return trainable
    scale = jnp.clip(trainable["clip"]["logit_scale"], 0.0, MAX_LOGIT_SCALE)
    return trainable | {"clip": trainable["clip"] | {"logit_scale": scale}}


def make_train_step(
    model: TextVideoModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    microbatches: int = 1,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """The step `(state, frozen, batch) -> (state, metrics)`, to be jitted by the caller.

    Args:
        mesh: the devices that the batch is sharded over, if there are several.
        microbatches: in how many parts a device embeds its rows; the loss still compares each
            pair with the whole batch.
    """

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradient = loss_and_gradient(
            model, state.trainable, frozen, batch, mesh, microbatches
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = clamp_logit_scale(optax.apply_updates(state.trainable, updates))
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return train_step


def learning_rate(train: ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0 over the first `warmup` share of the steps, then cosine decay to 0."""
    warmup = round(train.warmup * train.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, warmup, max(train.steps, warmup + 1)
    )


def weight_decay_mask(params: Tree) -> dict[str, Any]:
    """True where weight decay applies."""
    spared = re.compile("|".join(NO_WEIGHT_DECAY))
    return unflatten({name: not spared.fullmatch(name) for name in flatten(params)})


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; `train` is the config's section of that name."""
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(learning_rate(train), weight_decay=train.weight_decay, mask=weight_decay_mask),
    )
