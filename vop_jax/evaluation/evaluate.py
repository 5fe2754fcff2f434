"""From a split to ranks: embed every clip and caption once, then compare."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vop_jax.data import tokenizer
from vop_jax.evaluation import metrics, rescoring
from vop_jax.evaluation.ranks import Score
from vop_jax.model import TextVideoModel
from vop_jax.training import prefetch, sharding
from vop_jax.training.progress import Progress
from vop_jax.training.sharding import map_rows

TOP = 5  # videos kept of each text's ranking

Encode = Callable[[Any, jax.Array], jax.Array]  # (params, rows) -> unit rows [N, E]


@dataclasses.dataclass(frozen=True)
class Bank:
    """Training clips, each with one caption: the queries that QB-Norm compares with.

    Attributes:
        videos: starts one pass, as in `EvalSet`.
        ids: int32 [B, T], a caption of each.
    """

    videos: Callable[[], Iterator[dict[str, np.ndarray]]]
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A split to be evaluated; the loop never knows where it came from.

    Attributes:
        videos: starts one pass; batches of "frames" uint8 [b, F, S, S, 3] and "mask" bool [b].
        ids: int32 [N, T], all captions.
        video_of_text: int [N], each caption's video.
        contrasts: {what is turned: int32 [N, T], each caption with that turned}.
        missed_texts, missed_videos: what unreadable videos leave as misses.
        extra: "dual_softmax", "query_bank": what else is ranked by, in rows of their own.
        bank: of training clips, needed for "query_bank" alone.
        text_buckets: widths that captions are cut to where they fit, see `tokenizer.fit_bucket`.
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


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        results: {"t2v": {"R@1": …, "MdR": …}, "v2t": …}; where a video has several captions
            also "v2t_per_caption" and "v2t_grouped"; for each extra also "t2v_dual_softmax" …;
            with contrasts also {"accuracy": {what is turned: percent}}, of the texts that were
            read.
        ranks: of the texts and videos that were read.
        top: the best videos of each text, see `metrics.top_videos`.
    """

    results: dict[str, dict[str, float]]
    ranks: metrics.Ranks
    top: tuple[np.ndarray, np.ndarray]


def make_encoders(model: TextVideoModel, mesh: Mesh) -> tuple[Encode, Encode]:
    """Jitted (encode_video, encode_text): rows sharded on the way in, whole on the way out."""

    def jitted(method: str) -> Encode:
        def encode(params, rows):
            return model.apply({"params": params}, rows, method=method)

        return jax.jit(map_rows(mesh, encode), out_shardings=sharding.replicated(mesh))

    return jitted("encode_video"), jitted("encode_text")


def batch_size_for(mesh: Mesh, count: int, largest: int) -> int:
    """Of `count` rows: no more than there are, as far as the mesh divides them."""
    ways = sharding.row_shards(mesh)
    return min(largest, -(-count // ways) * ways)


def embed_videos(
    encode: Encode, params: Any, mesh: Mesh, batches: Iterator[dict[str, np.ndarray]], count: int
) -> np.ndarray:
    """float32 [M, E] of the M=`count` videos, padding rows dropped."""
    gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    rows, done = [], 0
    with (
        contextlib.closing(prefetch.placed(mesh, batches)) as placed,
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
    """int32 [N, T] -> float32 [N, E], in batches of one size, each as wide as it has to be."""
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


def evaluate(
    encoders: tuple[Encode, Encode], params: Any, mesh: Mesh, data: EvalSet, batch_size: int
) -> Evaluation:
    """Embeds a split with these parameters and compares all of it."""
    encode_video, encode_text = encoders
    count = int(data.video_of_text.max()) + 1
    videos = embed_videos(encode_video, params, mesh, data.videos(), count)
    reading = batch_size, data.text_buckets
    texts = embed_texts(encode_text, params, mesh, data.ids, *reading)
    misses = data.missed_texts, data.missed_videos
    ranks = metrics.rank_pairs(texts, videos, data.video_of_text)
    results = _sides(metrics.with_misses(ranks, *misses))
    for name in data.extra:
        if name == "dual_softmax":
            scores = _dual_softmax(texts, videos, params)
        else:
            scores = _query_bank(encoders, params, mesh, data, batch_size, texts, videos)
        found = metrics.rank_pairs(texts, videos, data.video_of_text, scores=scores)
        of_all = _sides(metrics.with_misses(found, *misses))
        results |= {f"{side}_{name}": of_all[side] for side in ("t2v", "v2t")}
    if data.contrasts:
        results["accuracy"] = {}
    for name, ids in data.contrasts.items():
        turned = embed_texts(encode_text, params, mesh, ids, *reading)
        accuracy = metrics.contrast_accuracy(texts, turned, videos, data.video_of_text)
        results["accuracy"][name] = accuracy
    return Evaluation(results, ranks, metrics.top_videos(texts, videos, TOP))


def _sides(ranks: metrics.Ranks) -> dict[str, dict[str, float]]:
    sides = {"t2v": metrics.summarize(ranks.t2v), "v2t": metrics.summarize(ranks.v2t)}
    if len(ranks.t2v) > len(ranks.v2t):  # else all protocols are one
        sides["v2t_per_caption"] = metrics.summarize(ranks.v2t_per_caption)
        sides["v2t_grouped"] = metrics.summarize(ranks.v2t_grouped)
    return sides


def _dual_softmax(texts: np.ndarray, videos: np.ndarray, params: Any) -> tuple[Score, Score]:
    """At the scale of the loss, that of `Clip.temperature`."""
    scale = math.exp(float(params["clip"]["logit_scale"]))
    return (
        rescoring.dual_softmax(texts, videos, scale),
        rescoring.dual_softmax(videos, texts, scale),
    )


def _query_bank(
    encoders: tuple[Encode, Encode],
    params: Any,
    mesh: Mesh,
    data: EvalSet,
    batch_size: int,
    texts: np.ndarray,
    videos: np.ndarray,
) -> tuple[Score, Score]:
    """With captions of training clips in the bank for texts, the clips in that for videos."""
    if data.bank is None:
        raise ValueError("query_bank needs a bank of training clips")
    bank = data.bank
    of_videos = embed_videos(encoders[0], params, mesh, bank.videos(), len(bank.ids))
    reading = batch_size, data.text_buckets
    of_texts = embed_texts(encoders[1], params, mesh, bank.ids, *reading)
    return rescoring.query_bank(of_texts, videos), rescoring.query_bank(of_videos, texts)
