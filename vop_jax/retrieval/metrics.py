"""Ranks and what is reported of them.

One rank per query, always: 1 + the number of strictly better candidates, ties counted at
their mean rank. With several captions per video every caption is a text-to-video query, and a
video-to-text query is answered by the best-ranked of its own captions.
"""

import dataclasses

import numpy as np

RECALLS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of every query in both directions, from 1; halves come from ties."""

    t2v: np.ndarray  # float64 [texts]
    v2t: np.ndarray  # float64 [videos]


def rank_pairs(
    texts: np.ndarray, videos: np.ndarray, video_of_text: np.ndarray, *, block: int = 1024
) -> Ranks:
    """Ranks all texts against all videos and back, a block of rows at a time.

    Args:
        texts: unit rows [N, E].
        videos: unit rows [M, E].
        video_of_text: int [N], the row of each text's video; every video has a text.
        block: rows per block; memory is block * max(N, M) floats.

    Raises:
        FloatingPointError: a similarity that is not finite; it would silently rank.
        ValueError: a video without a text, or an index out of range.
    """
    video_of_text = np.asarray(video_of_text)
    if not np.array_equal(np.unique(video_of_text), np.arange(len(videos))):
        raise ValueError("video_of_text must name every video at least once, and no other")
    t2v = np.empty(len(texts))
    for start in range(0, len(texts), block):
        own = video_of_text[start : start + block]
        similar = _similarities(texts[start : start + block], videos)
        target = np.take_along_axis(similar, own[:, None], axis=1)
        others = np.arange(len(videos))[None, :] != own[:, None]
        t2v[start : start + block] = _mean_rank(similar, target, others)
    v2t = np.empty(len(videos))
    for start in range(0, len(videos), block):
        rows = np.arange(start, min(start + block, len(videos)))
        similar = _similarities(videos[rows], texts)
        others = video_of_text[None, :] != rows[:, None]
        target = np.where(others, -np.inf, similar).max(axis=1, keepdims=True)
        v2t[rows] = _mean_rank(similar, target, others)
    return Ranks(t2v, v2t)


def top_videos(
    texts: np.ndarray, videos: np.ndarray, count: int, *, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """The best videos of each text, best first: (rows int [N, K], similarities [N, K]).

    K is `count` or the number of videos, if that is less; ties go to the earlier video.
    """
    rows, similarities = [], []
    for start in range(0, len(texts), block):
        similar = _similarities(texts[start : start + block], videos)
        order = np.argsort(-similar, axis=1, kind="stable")[:, :count]
        rows.append(order)
        similarities.append(np.take_along_axis(similar, order, axis=1))
    return np.concatenate(rows), np.concatenate(similarities)


def _similarities(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    similar = np.asarray(rows, np.float32) @ np.asarray(candidates, np.float32).T
    if not np.isfinite(similar).all():
        raise FloatingPointError("a similarity is not finite: the embeddings hold NaN or inf")
    return similar


def _mean_rank(similar: np.ndarray, target: np.ndarray, others: np.ndarray) -> np.ndarray:
    better = ((similar > target) & others).sum(axis=1)
    tied = ((similar == target) & others).sum(axis=1)
    return 1 + better + tied / 2


def with_misses(ranks: Ranks, texts: int, videos: int) -> Ranks:
    """Adds `texts` and `videos` queries that nothing answered, each at the last rank.

    A video that could not be read is still asked for: its captions rank behind every video
    of the whole set, and it behind every caption.
    """
    all_texts, all_videos = len(ranks.t2v) + texts, len(ranks.v2t) + videos
    return Ranks(
        np.append(ranks.t2v, np.full(texts, float(all_videos))),
        np.append(ranks.v2t, np.full(videos, float(all_texts))),
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
    """R@1, R@5, R@10 in percent, mean rank MnR and median rank MdR of one direction."""
    recalls = {f"R@{k}": 100.0 * float((ranks <= k).mean()) for k in RECALLS}
    return {**recalls, "MnR": float(ranks.mean()), "MdR": float(np.median(ranks))}
