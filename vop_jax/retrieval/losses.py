"""The contrastive objective."""

import jax
import jax.numpy as jnp
import optax


def symmetric_cross_entropy(text: jax.Array, video: jax.Array, temperature: jax.Array) -> jax.Array:
    """CLIP's loss over a batch of pairs: row i of one side belongs to row i of the other.

    Written over the global batch: under `jit` with sharded rows the compiler gathers the
    embeddings, so every device sees all negatives.

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
