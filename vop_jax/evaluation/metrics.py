"""Retrieval metrics: ranks of both directions, re-scored ranks, and their summary.

A query has one rank: 1 + the number of better candidates, ties counted at their mean rank. With
several captions per video every caption is a text-to-video query. A video-to-text query is
answered by the best-ranked of its own captions, among single captions of other videos or, as in
CLIP4Clip, among their groups of captions.

Dual softmax and QB-Norm correct for hubs, candidates that are near to every query. They look at
more queries than one, so their ranks are reported in rows of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.evaluation.ranks import Score, best_candidates, grouped_ranks, log_sums, pair_ranks

RECALLS = (1, 5, 10)
RESAMPLES = 2000  # of a bootstrap
BETA = 20.0  # QB-Norm's inverse temperature, as its authors set it
ROOT = 8  # of the dual softmax, see `_dual_softmax`


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of every query in both directions, from 1; halves come from ties.

    Attributes:
        t2v: float64 [N], each caption's video among all videos.
        v2t: float64 [M], each video's best caption among those of other videos.
        v2t_per_caption: float64 [N], each caption for its video among those of other videos.
        v2t_grouped: float64 [M], each video's captions among the other videos' groups of
            captions; a group is as near as its nearest caption.
    """

    t2v: np.ndarray
    v2t: np.ndarray
    v2t_per_caption: np.ndarray
    v2t_grouped: np.ndarray


def rank_pairs(
    texts: np.ndarray,
    videos: np.ndarray,
    video_of_text: np.ndarray,
    *,
    scores: tuple[Score, Score] | None = None,
) -> Ranks:
    """Ranks all texts against all videos and back.

    Args:
        texts: unit rows [N, E].
        videos: unit rows [M, E].
        video_of_text: int [N], the row of each text's video; every video has a text.
        scores: re-scorings to rank by, text to video and video to text; None: similarity.

    Raises:
        FloatingPointError: a similarity is not finite; it would rank without a sign of it.
        ValueError: a video has no text, or an index is out of range.
    """
    owner = np.asarray(video_of_text)
    if not np.array_equal(np.unique(owner), np.arange(len(videos))):
        raise ValueError("video_of_text must name every video at least once, and no other")
    t2v, per_caption = pair_ranks(texts, videos, owner, scores=scores)
    v2t = np.full(len(videos), np.inf)
    np.minimum.at(v2t, owner, per_caption)
    grouped = v2t
    if len(texts) > len(videos):  # else each group is one caption
        score = None if scores is None else scores[1]
        grouped = grouped_ranks(videos, texts, owner, score=score)
    return Ranks(t2v, v2t, per_caption, grouped)


def dual_softmax(queries: np.ndarray, candidates: np.ndarray, scale: float) -> Score:
    """CAMoE's dual softmax (arXiv 2109.04290) at test time: s times its softmax over queries.

    score[q, c] = s[q, c] * exp(scale * s[q, c]) / sum over all queries r of exp(scale * s[r, c])

    Args:
        queries: unit rows [Q, E], all that are ranked.
        candidates: unit rows [C, E].
        scale: the factor on similarities that the model was trained with.
    """
    sums = log_sums(queries, candidates, scale)
    return Score(_dual_softmax, np.full(len(queries), scale, np.float32), np.asarray(sums))


def _dual_softmax(similar: jax.Array, scale: jax.Array, sums: jax.Array) -> jax.Array:
    """The score's eighth root, which ranks alike; the score itself underflows where it is small."""
    log_share = scale * similar - sums
    return jnp.sign(similar) * jnp.abs(similar) ** (1 / ROOT) * jnp.exp(log_share / ROOT)


def query_bank(bank: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> Score:
    """QB-Norm (CVPR 2022, arXiv 2112.12777) with the dynamic inverted softmax.

    score[q, c] = exp(beta * s[q, c]) / sum over bank queries b of exp(beta * s[b, c])

    for queries whose nearest candidate is also the nearest of some bank query, else s[q, c].

    Args:
        bank: unit rows [B, E] of the queries' kind, from the training split.
        queries: unit rows [Q, E].
        candidates: unit rows [C, E].
    """
    sums = log_sums(bank, candidates, BETA)
    of_bank, of_queries = (
        best_candidates(rows, candidates, 1)[0][:, 0] for rows in (bank, queries)
    )
    return Score(_query_bank, np.isin(of_queries, of_bank), np.asarray(sums))


def _query_bank(similar: jax.Array, is_active: jax.Array, sums: jax.Array) -> jax.Array:
    """The logarithm of the quotient, which ranks the candidates of a query alike."""
    return jnp.where(is_active, BETA * similar - sums, similar)


def with_misses(ranks: Ranks, texts: int, videos: int) -> Ranks:
    """Adds `texts` and `videos` queries as misses, each at the last rank.

    Unreadable videos still count as queries: their captions rank behind every video of the whole
    set, and they themselves behind every caption or group of captions.
    """
    all_texts, all_videos = len(ranks.t2v) + texts, len(ranks.v2t) + videos
    return Ranks(
        np.append(ranks.t2v, np.full(texts, float(all_videos))),
        np.append(ranks.v2t, np.full(videos, float(all_texts))),
        np.append(ranks.v2t_per_caption, np.full(texts, float(all_texts))),
        np.append(ranks.v2t_grouped, np.full(videos, float(all_videos))),
    )


def contrast_accuracy(
    texts: np.ndarray, contrasts: np.ndarray, videos: np.ndarray, video_of_text: np.ndarray
) -> float:
    """Percent of videos that are closer to their caption than to its contrast; ties count half.

    Args:
        texts, contrasts: unit rows [N, E]; contrast i differs from text i in one thing.
        videos: unit rows [M, E].
        video_of_text: int [N], the row of each text's video.
    """
    own = videos[np.asarray(video_of_text)]
    difference = ((texts - contrasts) * own).sum(axis=-1)
    if not np.isfinite(difference).all():
        raise FloatingPointError("a similarity is not finite: the embeddings hold NaN or inf")
    return 100.0 * float(((difference > 0) + (difference == 0) / 2).mean())


def summarize(ranks: np.ndarray) -> dict[str, float]:
    """Ranks [Q] of one direction -> R@1, R@5, R@10 in percent, mean rank MnR, median rank MdR.

    R@k is the share of ranks of at most k: a rank of 5.5, from a tie, is not in R@5.
    """
    recalls = {f"R@{k}": 100.0 * float((ranks <= k).mean()) for k in RECALLS}
    return {**recalls, "MnR": float(ranks.mean()), "MdR": float(np.median(ranks))}


def recall_intervals(ranks: np.ndarray, video_of_query: np.ndarray) -> dict[str, list[float]]:
    """95 % confidence intervals [low, high] of R@1, R@5, R@10: a bootstrap over the queries.

    It draws videos, each with all its queries: the captions of one video are not independent.

    Args:
        ranks: [Q], of one direction.
        video_of_query: int [Q], numbers from 0, each at least once.
    """
    hits = ranks[:, None] <= np.array(RECALLS)
    counts = np.zeros((int(video_of_query.max()) + 1, 1 + len(RECALLS)))
    np.add.at(counts, video_of_query, np.column_stack([np.ones(len(ranks)), hits]))
    # Videos with equal counts are one kind. How many of each kind a resample holds is multinomial.
    kinds, videos = np.unique(counts, axis=0, return_counts=True)
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(len(counts), videos / len(counts), RESAMPLES) @ kinds
    ends = np.percentile(100.0 * drawn[:, 1:] / drawn[:, :1], (2.5, 97.5), axis=0)
    return {f"R@{k}": pair for k, pair in zip(RECALLS, ends.T.tolist(), strict=True)}
