"""From embeddings to rows: which sides are reported, misses, extras and where a bank comes from."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.test_ranks import random_pairs
from vop_jax.config import base as configs
from vop_jax.config.keys import EXTRAS
from vop_jax.errors import UserError
from vop_jax.evaluation import evaluate, metrics
from vop_jax.experiment import inputs, results
from vop_jax.training import sharding

BATCH = 4
SCALE = 150.0  # larger than the 100 at which OpenAI's training stopped


def batches(first, count):
    """A pass over the rows of `count` videos from `first` on, the last batch filled up."""
    for start in range(0, count, BATCH):
        at = np.arange(start, start + BATCH)
        yield {"frames": first + np.minimum(at, count - 1), "mask": at < count}


def encode(params, rows):
    """Numbers of videos, or of texts behind them, are embedded by looking them up."""
    return params["rows"][np.asarray(rows).reshape(-1)]


def evaluated(texts, videos, owner, bank, **options):
    """`evaluate_split` for given embeddings; `bank` is (texts, videos)."""
    rows = np.concatenate([videos, bank[1], texts, bank[0]])
    ids = np.arange(len(videos) + len(bank[1]), len(rows), dtype=np.int32)[:, None]
    data = evaluate.EvalSet(
        partial(batches, 0, len(videos)),
        ids[: len(texts)],
        owner,
        bank=evaluate.Bank(partial(batches, len(videos), len(bank[1])), ids[len(texts) :]),
        **options,
    )
    params = {"rows": rows, "clip": {"logit_scale": np.float32(math.log(SCALE))}}
    mesh = sharding.make_mesh(1)
    return evaluate.evaluate_split((encode, encode), params, mesh, data, BATCH)


@pytest.mark.parametrize(
    ("devices", "count", "expected"), [(1, 1, 1), (8, 1, 8), (8, 9, 16), (1, 1000, 32)]
)
def test_a_few_clips_are_not_padded_to_a_whole_batch(devices, count, expected):
    assert evaluate.batch_size_for(sharding.make_mesh(devices), count, 32) == expected


def test_texts_are_embedded_in_the_narrowest_bucket_of_each_block():
    ids = np.zeros((10, 20), np.int32)
    lengths = np.array([2, 3, 4, 5, 5, 8, 2, 2, 9, 2])  # slots
    ids[np.arange(10), lengths - 1] = 7 + np.arange(10)
    seen = []

    def encode(params, rows):
        seen.append(rows.shape)
        return np.asarray(rows).max(axis=1, keepdims=True)

    mesh = sharding.make_mesh(1)
    found = evaluate.embed_texts(encode, {}, mesh, ids, BATCH, text_buckets=(5, 8))
    assert found[:, 0].tolist() == list(range(7, 17))
    assert seen == [(BATCH, 5), (BATCH, 8), (BATCH, 20)]


def test_every_protocol_and_extra_has_a_row_of_its_own():
    texts, videos, owner = random_pairs(17, 7, similar=0.3)
    bank = bank_texts, bank_videos = random_pairs(5, 5, seed=1)[:2]
    assert list(evaluated(texts[:7], videos, np.arange(7), bank).results) == ["t2v", "v2t"]
    found = evaluated(texts, videos, owner, bank, extra=EXTRAS).results
    extras = [f"{side}_{name}" for name in EXTRAS for side in ("t2v", "v2t")]
    assert list(found) == ["t2v", "v2t", "v2t_per_caption", "v2t_grouped", *extras]
    mean = {side: values["MnR"] for side, values in found.items()}
    assert mean["v2t_grouped"] < mean["v2t"] < mean["v2t_per_caption"]
    scores = {
        "": None,
        "_dual_softmax": (
            metrics.dual_softmax(texts, videos, SCALE),
            metrics.dual_softmax(videos, texts, SCALE),
        ),
        "_query_bank": (
            metrics.query_bank(bank_texts, texts, videos),
            metrics.query_bank(bank_videos, videos, texts),
        ),
    }
    for name, rescored in scores.items():
        ranks = vars(metrics.rank_pairs(texts, videos, owner, scores=rescored))
        for side in ranks if not name else ("t2v", "v2t"):
            assert found[side + name] == metrics.summarize(ranks[side])
    assert len({found[f"t2v{name}"]["MnR"] for name in scores}) == 3

    lines = results.format_results(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(found)
    assert {len(line) for line in lines} == {58}
    plain = {name: found[name] for name in ("t2v", "v2t")}  # the training run had no extra rows
    summary = found | {"before": plain, "method": "vop", "steps": 3, "trainable_params": 9}
    summary |= {"num_texts": 17, "num_videos": 7, "skipped_videos": []}
    lines = results.format_summary(summary, "DIR").splitlines()[2:-1]
    expected = [[s, w] for s in found for w in ("before", "after") if s in plain or w == "after"]
    assert [line.split()[:2] for line in lines] == expected
    assert len({len(line) for line in lines}) == 1
    assert results.to_scalars(found)["t2v_query_bank/R@1"] == found["t2v_query_bank"]["R@1"]


def test_misses_count_in_every_row():
    texts, videos, owner = random_pairs(7, 7, similar=50.0)
    bank = random_pairs(5, 5, seed=1)[:2]
    missing = {"missed_texts": 6, "missed_videos": 2}
    evaluation = evaluated(texts, videos, owner, bank, extra=("dual_softmax",), **missing)
    found = evaluation.results
    owners = {side: queries.videos.tolist() for side, queries in evaluation.queries.items()}
    assert owners["t2v"] == [*owner, 7, 7, 7, 8, 8, 8] and owners["v2t"] == [*range(9)]
    extras = ["t2v_dual_softmax", "v2t_dual_softmax"]
    assert list(found) == ["t2v", "v2t", "v2t_per_caption", "v2t_grouped", *extras]
    for side, values in found.items():
        # All that could be read are right; of 13 captions and 9 videos the others come last.
        last, missed = (9, 6) if side.startswith("t2v") else (13, 2)
        last = 9 if side == "v2t_grouped" else last
        missed = 6 if side == "v2t_per_caption" else missed
        assert values["R@1"] == pytest.approx(100 * 7 / (7 + missed))
        assert values["MnR"] == pytest.approx((7 + missed * last) / (7 + missed))


def split(ids, skipped=()):
    return SimpleNamespace(
        ids=list(ids),
        captions=[(f"first of {i}", "another") for i in ids],
        rows=[{"id": i} for i in ids],
        skipped=[SimpleNamespace(id=i) for i in skipped],
    )


def test_the_bank_holds_the_same_training_clips_in_every_run(monkeypatch):
    monkeypatch.setattr(inputs, "_eval_spec", lambda run, split: None)
    test = split("bxy", skipped="e")

    def bank_of(train, extra="query_bank", bank=1000):
        """The bank that a run with these splits makes, without its videos being read."""
        config = configs.base_config()
        config.eval.update(extra=(extra,), bank=bank)
        packed = SimpleNamespace(splits={"train": split(train), "test": test})
        run = SimpleNamespace(config=config)
        return inputs._bank(run, packed, lambda captions: captions)

    bank = bank_of("abcdefg")
    members = bank.videos.args[0]
    assert sorted(members.ids) == ["a", "c", "d", "f", "g"]  # not b and e, the test's
    assert bank.ids == [f"first of {i}" for i in members.ids]
    names = [f"clip{i}" for i in range(30)]
    eight = bank_of(names, bank=8).ids
    assert len(eight) == 8 and eight != [f"first of {name}" for name in names[:8]]
    assert bank_of(names[::-1], bank=8).ids == bank_of(names, bank=9).ids[:8] == eight
    assert bank_of("ab", extra="dual_softmax") is None
    with pytest.raises(UserError, match=r"'query_bank': all clips of 'train' are also in another"):
        bank_of("bex")
