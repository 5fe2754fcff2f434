"""From embeddings to rows: which sides are reported, misses, extras and where a bank comes from."""

import math
import sys
from types import SimpleNamespace

import absl.flags
import numpy as np
import pytest
from ml_collections import config_flags

from tests.evaluation.test_ranks import random_pairs
from vop_jax.config import base as configs
from vop_jax.errors import UserError
from vop_jax.evaluation import evaluate, metrics
from vop_jax.experiment import inputs, results
from vop_jax.training import sharding

BATCH = 4
BOTH = ("dual_softmax", "query_bank")
SCALE = 20.0


def batches(count):
    """A pass over the numbers of `count` videos, the last batch filled up."""
    for start in range(0, count, BATCH):
        rows = np.arange(start, start + BATCH)
        yield {"frames": np.minimum(rows, count - 1), "mask": rows < count}


def encode(params, rows):
    """Numbers of videos, or of texts behind them, are embedded by looking them up."""
    return params["rows"][np.asarray(rows).reshape(-1)]


def evaluated(texts, videos, owner, bank=None, **options):
    """`evaluate_split` of given embeddings; `bank` is (texts, videos)."""
    bank_texts, bank_videos = bank or (texts[:0], videos[:0])
    rows = np.concatenate([videos, bank_videos, texts, bank_texts])
    first = len(videos) + len(bank_videos)
    ids = np.arange(first, len(rows), dtype=np.int32)[:, None]

    def bank_batches():
        for batch in batches(len(bank_videos)):
            yield batch | {"frames": batch["frames"] + len(videos)}

    if bank:
        options["bank"] = evaluate.Bank(bank_batches, ids[len(texts) :])
    data = evaluate.EvalSet(lambda: batches(len(videos)), ids[: len(texts)], owner, **options)
    params = {"rows": rows, "clip": {"logit_scale": np.float32(math.log(SCALE))}}
    mesh = sharding.make_mesh(1)
    return evaluate.evaluate_split((encode, encode), params, mesh, data, BATCH)


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
    assert list(evaluated(*random_pairs(7, 7)).results) == ["t2v", "v2t"]
    texts, videos, owner = random_pairs(17, 7, similar=0.3)
    bank_texts, bank_videos, _ = random_pairs(5, 5, seed=1)
    plain = evaluated(texts, videos, owner).results
    ranks = vars(metrics.rank_pairs(texts, videos, owner))
    assert list(plain) == ["t2v", "v2t", "v2t_per_caption", "v2t_grouped"]
    assert plain == {side: metrics.summarize(ranks[side]) for side in plain}
    mean = {side: values["MnR"] for side, values in plain.items()}
    assert mean["v2t_grouped"] < mean["v2t"] < mean["v2t_per_caption"]
    found = evaluated(texts, videos, owner, (bank_texts, bank_videos), extra=BOTH).results
    assert {name: found[name] for name in plain} == plain
    assert list(found)[4:] == [f"{side}_{name}" for name in BOTH for side in ("t2v", "v2t")]
    for name, scores in (
        (
            "dual_softmax",
            (
                metrics.dual_softmax(texts, videos, SCALE),
                metrics.dual_softmax(videos, texts, SCALE),
            ),
        ),
        (
            "query_bank",
            (
                metrics.query_bank(bank_texts, texts, videos),
                metrics.query_bank(bank_videos, videos, texts),
            ),
        ),
    ):
        ranks = metrics.rank_pairs(texts, videos, owner, scores=scores)
        assert found[f"t2v_{name}"] == metrics.summarize(ranks.t2v)
        assert found[f"v2t_{name}"] == metrics.summarize(ranks.v2t)
        assert found[f"t2v_{name}"] != plain["t2v"]


def test_the_scale_of_dual_softmax_is_that_of_the_loss(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "dual_softmax", lambda t, v, scale: seen.append(scale))
    rows = np.eye(2, dtype=np.float32)
    for log_scale in (math.log(SCALE), math.log(1000.0)):
        evaluate._dual_softmax(rows, rows, {"clip": {"logit_scale": np.float32(log_scale)}})
    assert seen == pytest.approx([SCALE, SCALE, 1000.0, 1000.0])  # both directions


def test_misses_count_in_every_row():
    texts, videos, owner = random_pairs(6, 6, similar=50.0)
    missing = {"missed_texts": 6, "missed_videos": 2}
    bank = random_pairs(4, 4, seed=1)[:2]
    found = evaluated(texts, videos, owner, bank, extra=("dual_softmax",), **missing).results
    extras = ["t2v_dual_softmax", "v2t_dual_softmax"]
    assert list(found) == ["t2v", "v2t", "v2t_per_caption", "v2t_grouped", *extras]
    for side, values in found.items():
        # All that could be read are right; of 12 captions and 8 videos the others come last.
        last, missed = (8, 6) if side.startswith("t2v") else (12, 2)
        last = 8 if side == "v2t_grouped" else last
        missed = 6 if side == "v2t_per_caption" else missed
        assert values["R@1"] == pytest.approx(100 * 6 / (6 + missed))
        assert values["MnR"] == pytest.approx((6 + missed * last) / (6 + missed))


def test_a_query_bank_without_one_is_refused():
    texts, videos, owner = random_pairs(4, 4)
    with pytest.raises(ValueError, match="bank of training clips"):
        evaluated(texts, videos, owner, extra=("query_bank",))


def split(ids, skipped=()):
    return SimpleNamespace(
        ids=list(ids),
        captions=[(f"first of {i}", "another") for i in ids],
        rows=[{"id": i} for i in ids],
        skipped=[SimpleNamespace(id=i) for i in skipped],
    )


@pytest.fixture(autouse=True)
def no_mesh(monkeypatch):
    monkeypatch.setattr(inputs, "_eval_spec", lambda run, split: None)


def bank_of(train, test, *, bank=1000, extra="query_bank"):
    """The bank that a run with these splits makes, without its videos being read."""
    config = configs.base_config()
    config.eval.update(extra=(extra,), bank=bank)
    packed = SimpleNamespace(splits={"train": train, "test": test})
    run = SimpleNamespace(config=config)
    return inputs._bank(run, packed, lambda captions: captions)


def test_the_bank_holds_training_clips_alone_with_their_first_captions():
    train, test = split("abcdefg"), split("bxy", skipped="e")
    bank = bank_of(train, test)
    members = bank.videos.args[0]
    assert sorted(members.ids) == ["a", "c", "d", "f", "g"]  # not b and e, the test's
    assert bank.ids == [f"first of {i}" for i in members.ids]


def test_the_bank_is_the_same_whatever_the_order_of_the_annotations():
    names = [f"clip{i}" for i in range(30)]
    drawn = [bank_of(split(ids), split("x"), bank=8).ids for ids in (names, names[::-1])]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8
    assert drawn[0] == bank_of(split(names), split("x"), bank=9).ids[:8]
    assert drawn[0] != [f"first of {name}" for name in names[:8]]


def test_no_bank_is_made_unless_it_is_asked_for():
    assert bank_of(split("ab"), split("c"), extra="dual_softmax") is None
    with pytest.raises(UserError, match=r"'query_bank': all clips of 'train' are also in another"):
        bank_of(split("ab"), split("ab"))


def with_extra(value, **data):
    config = configs.base_config()
    with config.ignore_type():
        config.eval.extra = value
    config.data.update(data)
    return config


@pytest.mark.parametrize(
    ("value", "names"),
    [
        *(
            (v, BOTH)
            for v in (list(BOTH), "dual_softmax,query_bank", ("dual_softmax, query_bank",))
        ),
        ((*BOTH, *BOTH), BOTH),
        *((v, ()) for v in ((), "", ("",))),
    ],
)
def test_extras_may_be_a_list_or_a_string(value, names):
    configs.validate(with_extra(value))
    assert configs.extra_rows(with_extra(value)) == names


@pytest.mark.parametrize("value", [("softmax",), "dual", 3, (3,), ("dual_softmax", "x")])
def test_extras_that_do_not_exist_are_refused(value):
    message = r"^config.eval.extra=.*: allowed are dual_softmax, query_bank$"
    with pytest.raises(UserError, match=message):
        configs.validate(with_extra(value))


def test_a_bank_of_the_evaluated_split_is_refused():
    config = with_extra(("query_bank",), train_split="all", eval_split="all")
    with pytest.raises(UserError, match=r"'query_bank': the bank comes from .*'all' is also"):
        configs.validate(config)
    configs.validate(with_extra(("dual_softmax",), train_split="all", eval_split="all"))


def summary_of(found, before):
    return {
        **{"method": "vop", "steps": 3, "trainable_params": 9, "num_texts": 17, "num_videos": 7},
        **found,
        **{"before": before, "skipped_videos": []},
    }


def test_tables_have_a_row_for_every_side():
    texts, videos, owner = random_pairs(17, 7)
    bank = random_pairs(5, 5, seed=1)[:2]
    found = evaluated(texts, videos, owner, bank, extra=BOTH).results
    sides = [line.split()[0] for line in results.format_results(found).splitlines()[1:]]
    assert sides == list(found)
    assert {len(line) for line in results.format_results(found).splitlines()} == {58}
    plain = {name: found[name] for name in ("t2v", "v2t")}  # the training run had no extra rows
    table = results.format_summary(summary_of(found, plain), "DIR").splitlines()[2:-1]
    rows = [line.split()[:2] for line in table]
    expected = [[s, w] for s in found for w in ("before", "after") if s in plain or w == "after"]
    assert rows == expected
    assert len({len(line) for line in table}) == 1
    assert results.to_scalars(found)["t2v_query_bank/R@1"] == found["t2v_query_bank"]["R@1"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--config.eval.extra=dual_softmax,query_bank"],
        ["--config.eval.extra=dual_softmax", "--config.eval.extra=query_bank"],
        ["--config.eval.extra=('dual_softmax', 'query_bank')"],
    ],
)
def test_extras_on_the_command_line(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", *flags])  # overrides are looked up there
    values = absl.flags.FlagValues()
    config_flags.DEFINE_config_dict("config", configs.base_config(), flag_values=values)
    values(sys.argv)
    assert configs.extra_rows(values.config) == BOTH
