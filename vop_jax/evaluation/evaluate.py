"""Evaluates a split: embeds every clip and caption once, then ranks them."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vop_jax.data import tokenizer
from vop_jax.evaluation import metrics
from vop_jax.evaluation.ranks import Score, best_candidates
from vop_jax.model import TextVideoModel
from vop_jax.training import prefetch, sharding
from vop_jax.training.progress import Progress
from vop_jax.training.sharding import map_rows

TOP = 5  # videos reported of each text's ranking

Encode = Callable[[Any, jax.Array], jax.Array]  # (params, rows) -> unit rows [N, E]


@dataclasses.dataclass(frozen=True)
class Bank:
    """Training clips with one caption each: the queries that QB-Norm compares with.

    Attributes:
        videos: starts one pass, as in `EvalSet`.
        ids: int32 [N, T], one caption of each clip.
    """

    videos: Callable[[], Iterator[dict[str, np.ndarray]]]
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A split to evaluate, independent of where its clips come from.

    Attributes:
        videos: starts one pass; yields batches of "frames" uint8 [b, F, S, S, 3] and "mask"
            bool [b], False in rows that only fill up the batch.
        ids: int32 [N, T], all captions.
        video_of_text: int [N], the video of each caption.
        contrasts: {attribute: int32 [N, T]}, each caption with that attribute reversed.
        missed_texts, missed_videos: captions and videos that count as misses, being unreadable.
        extra: further rankings, each reported in rows of its own: "dual_softmax", "query_bank".
        bank: only needed for "query_bank".
        text_buckets: widths of caption batches, see `tokenizer.fit_bucket`.
        fingerprint: of the clips, their captions and the CLIP that compares them.
    """

    videos: Callable[[], Iterator[dict[str, np.ndarray]]]
    ids: np.ndarray
    video_of_text: np.ndarray
    contrasts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    missed_texts: int = 0
    missed_videos: int = 0
    extra: Sequence[str] = ()
    bank: Bank | None = None
    text_buckets: Sequence[int] = ()
    fingerprint: str = ""


class Queries(NamedTuple):
    """The rank of each query of a side, and the number of its video; both [Q]."""

    ranks: np.ndarray
    videos: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics and rankings of a split.

    Attributes:
        results: {"t2v": {"R@1": …, "MdR": …}, "v2t": …}. Splits with several captions per video
            add "v2t_per_caption" and "v2t_grouped", each extra ranking adds "t2v_dual_softmax" …,
            contrasts add {"accuracy": {attribute: percent}} over the readable texts.
        ranks: of the readable texts and videos.
        top: the best videos of each text and their similarities, see `ranks.best_candidates`.
        queries: the ranks behind each row of the results, misses included.
    """

    results: dict[str, dict[str, float]]
    ranks: metrics.Ranks
    top: tuple[np.ndarray, np.ndarray]
    queries: Mapping[str, Queries] = dataclasses.field(default_factory=dict)


def make_encoders(model: TextVideoModel, mesh: Mesh) -> tuple[Encode, Encode]:
    """Jitted (encode_video, encode_text): they take sharded rows and return replicated ones."""

    def jitted(method: str) -> Encode:
        def encode(params: Any, rows: jax.Array) -> Any:
            return model.apply({"params": params}, rows, method=method)

        return jax.jit(map_rows(mesh, encode), out_shardings=sharding.replicated(mesh))

    return jitted("encode_video"), jitted("encode_text")


def batch_size_for(mesh: Mesh, count: int, largest: int) -> int:
    """The batch size for `count` rows: at most `largest`, and a multiple of the row shards."""
    ways = sharding.row_shards(mesh)
    return min(largest, -(-count // ways) * ways)


def embed_videos(
    encode: Encode, params: Any, mesh: Mesh, batches: Iterator[dict[str, np.ndarray]], count: int
) -> np.ndarray:
    """Embeds M=`count` videos: float32 [M, E], without the rows that fill up the last batch."""
    gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    rows, done = [], 0
    with (
        contextlib.closing(prefetch.prefetch_batches(mesh, batches)) as placed,
        Progress("evaluation, video", count) as progress,
    ):
        for batch in placed:
            embedded = np.asarray(encode(params, batch["frames"]))
            rows.append(embedded[np.asarray(gather(batch["mask"]))])
            done += len(rows[-1])
            progress.advance(done)
    return np.concatenate(rows)


def embed_texts(
    encode: Encode,
    params: Any,
    mesh: Mesh,
    ids: np.ndarray,
    batch_size: int,
    text_buckets: Sequence[int] = (),
) -> np.ndarray:
    """Embeds captions, int32 [N, T] -> float32 [N, E], each batch in its narrowest bucket."""
    rows, batch_size = [], batch_size_for(mesh, len(ids), batch_size)
    with Progress("evaluation, caption", len(ids)) as progress:
        for start in range(0, len(ids), batch_size):
            block = tokenizer.fit_bucket(ids[start : start + batch_size], text_buckets)
            padded = np.concatenate([block, np.repeat(block[-1:], batch_size - len(block), axis=0)])
            local = padded[sharding.process_rows(mesh, batch_size)]
            placed = sharding.to_global(mesh, {"ids": local})["ids"]
            rows.append(np.asarray(encode(params, placed))[: len(block)])
            progress.advance(start + len(block))
    return np.concatenate(rows)


def evaluate_split(
    encoders: tuple[Encode, Encode], params: Any, mesh: Mesh, data: EvalSet, batch_size: int
) -> Evaluation:
    """Embeds a split with these parameters and compares all of it."""
    encode_video, encode_text = encoders
    count = int(data.video_of_text.max()) + 1

    def embed(ids: np.ndarray) -> np.ndarray:
        return embed_texts(encode_text, params, mesh, ids, batch_size, data.text_buckets)

    def ranked(scores: tuple[Score, Score] | None = None) -> metrics.Ranks:
        return metrics.rank_pairs(texts, videos, data.video_of_text, scores=scores)

    def queries_of(ranks: metrics.Ranks) -> dict[str, Queries]:
        missed = data.missed_texts, data.missed_videos
        return _sides(metrics.with_misses(ranks, *missed), _with_missed(data, count))

    videos = embed_videos(encode_video, params, mesh, data.videos(), count)
    texts = embed(data.ids)
    ranks = ranked()
    sides = queries_of(ranks)
    for name in data.extra:
        if name == "dual_softmax":
            scale = math.exp(float(params["clip"]["logit_scale"]))  # the temperature of the loss
            scores = (
                metrics.dual_softmax(texts, videos, scale),
                metrics.dual_softmax(videos, texts, scale),
            )
        else:
            assert data.bank is not None  # see `EvalSet`
            passes, ids = data.bank.videos(), data.bank.ids
            bank_videos = embed_videos(encode_video, params, mesh, passes, len(ids))
            scores = (
                metrics.query_bank(embed(ids), texts, videos),
                metrics.query_bank(bank_videos, videos, texts),
            )
        rescored = queries_of(ranked(scores))
        sides |= {f"{side}_{name}": rescored[side] for side in ("t2v", "v2t")}
    results = {side: metrics.summarize(queries.ranks) for side, queries in sides.items()}
    if data.contrasts:
        results["accuracy"] = {
            name: metrics.contrast_accuracy(texts, embed(ids), videos, data.video_of_text)
            for name, ids in data.contrasts.items()
        }
    return Evaluation(results, ranks, best_candidates(texts, videos, TOP), sides)


def _sides(ranks: metrics.Ranks, video_of_text: np.ndarray) -> dict[str, Queries]:
    each = np.arange(len(ranks.v2t))
    sides = {"t2v": Queries(ranks.t2v, video_of_text), "v2t": Queries(ranks.v2t, each)}
    if len(ranks.t2v) > len(ranks.v2t):  # else all protocols are the same
        sides["v2t_per_caption"] = Queries(ranks.v2t_per_caption, video_of_text)
        sides["v2t_grouped"] = Queries(ranks.v2t_grouped, each)
    return sides


def _with_missed(data: EvalSet, videos: int) -> np.ndarray:
    """`video_of_text`, with the captions of missed videos spread evenly over those."""
    spread = np.arange(data.missed_texts) * data.missed_videos // max(data.missed_texts, 1)
    return np.append(data.video_of_text, videos + spread)
