"""Ranks of both directions and what is reported of them.

One rank per query, always: 1 + the number of strictly better candidates, ties counted at
their mean rank. With several captions per video every caption is a text-to-video query. A
video-to-text query is answered by the best-ranked of its own captions, among single captions of
other videos or, as CLIP4Clip has it, among their groups of captions.
"""

import dataclasses

import numpy as np

from vop_jax.evaluation.pairs import pair_ranks
from vop_jax.evaluation.ranks import PLAIN, Score, best_candidates, grouped_ranks, own_ranks

RECALLS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of every query in both directions, from 1; halves come from ties.

    Attributes:
        t2v: float64 [texts], each caption's video among all videos.
        v2t: float64 [videos], each video's best caption among those of other videos.
        v2t_per_caption: float64 [texts], each caption for its video among those of other videos.
        v2t_grouped: float64 [videos], each video's captions among the other videos' groups of
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
    scores: tuple[Score, Score] = (PLAIN, PLAIN),
    elements: int | None = None,
) -> Ranks:
    """Ranks all texts against all videos and back, a part of the similarities at a time.

    Args:
        texts: unit rows [N, E].
        videos: unit rows [M, E].
        video_of_text: int [N], the row of each text's video; every video has a text.
        scores: what is ranked by, text to video and video to text; see `rescoring`.
        elements: bound on the similarities held at once, see `ranks.bound`.

    Raises:
        FloatingPointError: a similarity that is not finite; it would silently rank.
        ValueError: a video without a text, or an index out of range.
    """
    owner, every = np.asarray(video_of_text), np.arange(len(videos))
    if not np.array_equal(np.unique(owner), every):
        raise ValueError("video_of_text must name every video at least once, and no other")
    if scores == (PLAIN, PLAIN):
        t2v, per_caption = pair_ranks(texts, videos, owner, elements=elements)
    else:  # each side by scores of its own, and those of a query by its whole row
        t2v, per_caption = np.empty(len(texts)), np.empty(len(texts))
        text, _, rank = own_ranks(texts, videos, owner, every, score=scores[0], elements=elements)
        t2v[text] = rank
        _, text, rank = own_ranks(videos, texts, every, owner, score=scores[1], elements=elements)
        per_caption[text] = rank
    v2t = np.full(len(videos), np.inf)
    np.minimum.at(v2t, owner, per_caption)
    grouped = v2t
    if len(texts) > len(videos):  # else each group is one caption
        grouped = grouped_ranks(videos, texts, owner, score=scores[1], elements=elements)
    return Ranks(t2v, v2t, per_caption, grouped)


def top_videos(
    texts: np.ndarray, videos: np.ndarray, count: int, *, elements: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best videos of each text, best first: (rows int [N, K], similarities [N, K]).

    K is `count` or the number of videos, if that is less; ties go to the earlier video.
    """
    return best_candidates(texts, videos, count, elements=elements)


def with_misses(ranks: Ranks, texts: int, videos: int) -> Ranks:
    """Adds `texts` and `videos` queries that nothing answered, each at the last rank.

    A video that could not be read is still asked for: its captions rank behind every video
    of the whole set, and it behind every caption or group of captions.
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
    """How often a video is closer to its caption than to the contrast, in percent; ties half.

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
    """R@1, R@5, R@10 in percent, mean rank MnR and median rank MdR of one direction.

    R@k is the share of ranks of at most k: a rank of 5.5, from a tie, is not in R@5.
    """
    recalls = {f"R@{k}": 100.0 * float((ranks <= k).mean()) for k in RECALLS}
    return {**recalls, "MnR": float(ranks.mean()), "MdR": float(np.median(ranks))}
