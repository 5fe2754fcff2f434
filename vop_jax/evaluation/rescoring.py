"""Similarities re-scored against hubs: candidates that are near to every query.

Both look at more than one query at a time, the test's or the training split's, so that their
ranks are no plain retrieval and are reported in rows of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.evaluation.ranks import Score, best_candidates, log_sums

BETA = 20.0  # QB-Norm's inverse temperature, as its authors set it
ROOT = 8


def dual_softmax(
    queries: np.ndarray, candidates: np.ndarray, scale: float, *, elements: int | None = None
) -> Score:
    """CAMoE's dual softmax (arXiv 2109.04290) at test time: s times its softmax over queries.

    score[q, c] = s[q, c] * exp(scale * s[q, c]) / sum over all queries r of exp(scale * s[r, c])

    Args:
        queries: unit rows [Q, E], all that are ranked.
        candidates: unit rows [C, E].
        scale: the factor on similarities that the model was trained with.
    """
    sums = log_sums(queries, candidates, scale, elements=elements)
    return jax.tree_util.Partial(_dual_softmax, sums, jnp.float32(scale))


def _dual_softmax(sums: jax.Array, scale: jax.Array, similar: jax.Array) -> jax.Array:
    """The score's eighth root, which ranks alike; the score itself underflows where it is small."""
    log_share = scale * similar - sums[None, :]
    return jnp.sign(similar) * jnp.abs(similar) ** (1 / ROOT) * jnp.exp(log_share / ROOT)


def query_bank(bank: np.ndarray, candidates: np.ndarray, *, elements: int | None = None) -> Score:
    """QB-Norm (CVPR 2022, arXiv 2112.12777) with the dynamic inverted softmax.

    score[q, c] = exp(beta * s[q, c]) / sum over bank queries b of exp(beta * s[b, c])

    for queries whose nearest candidate is also the nearest of some bank query, else s[q, c].

    Args:
        bank: unit rows [B, E] of the queries' kind, from the training split.
        candidates: unit rows [C, E].
    """
    sums = log_sums(bank, candidates, BETA, elements=elements)
    nearest, _ = best_candidates(bank, candidates, 1, elements=elements)
    active = np.zeros(len(candidates), bool)
    active[nearest[:, 0]] = True
    return jax.tree_util.Partial(_query_bank, sums, jnp.asarray(active))


def _query_bank(sums: jax.Array, active: jax.Array, similar: jax.Array) -> jax.Array:
    """The logarithm of the quotient, which ranks alike: a query's ranks are among its own row."""
    activated = active[similar.argmax(axis=1)]
    return jnp.where(activated[:, None], BETA * similar - sums[None, :], similar)
