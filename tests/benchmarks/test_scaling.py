"""The arithmetic of the predictions, by hand; what the compiler says of a tiny step."""

import argparse
import dataclasses

import pytest

from benchmarks import scaling
from benchmarks.collectives import Collective
from tests import tiny
from vop_jax.config.clip import PRESETS
from vop_jax.training import sharding

SWITCHED = scaling.Machine("", 1.0, 8, 100.0, 10.0, 1.0, 7.0, torus=False, share=0.5)
TORUS = scaling.Machine("", 1.0, 16, 100.0, 10.0, 1.0, 7.0, torus=True)


def gather(devices, size=640, kind="all-gather"):
    return Collective(kind, "f32", (size // 4,), devices, "here")


@pytest.mark.parametrize(
    ("machine", "devices", "seconds"),
    [
        (SWITCHED, 1, 0),
        (SWITCHED, 4, 3 / 4 * 640 / 100 + 2),  # log2(4) hops of 1 s
        (SWITCHED, 32, 3 / 32 * 640 / 10 + 7 / 8 * 640 / 100 + 3 + 2 * 7),
        (TORUS, 16, 15 / 16 * 640 / 100 + 6),  # 3 hops along each of two rings
    ],
)
def test_seconds_of_a_gather(machine, devices, seconds):
    assert machine.seconds([gather(devices)], devices) == pytest.approx(seconds)
    twice = machine.seconds([gather(devices, kind="all-reduce")], devices)
    assert twice == pytest.approx(2 * seconds)


def test_an_operation_on_a_tuple_waits_once():
    one, two = ([gather(8, size)] for size in (640, 320))
    separate = [SWITCHED.seconds(c, 8) for c in (one, two)]
    assert SWITCHED.seconds(one + two, 8) == pytest.approx(sum(separate) - 3)


def test_assumptions_can_be_changed():
    assert scaling.assumed(SWITCHED, ["share=0.25", "group=4"]).share == 0.25
    assert scaling.assumed(SWITCHED, ["group=4"]).group == 4


def test_a_table_of_a_tiny_step(monkeypatch):
    clip = dataclasses.replace(tiny.CLIP, vision_layers=1, text_layers=1)
    monkeypatch.setitem(PRESETS, "ViT-B/32", clip)
    args = argparse.Namespace(
        arch="ViT-B/32", method="vop", frames=3, per_device=2, dtype="float32"
    )
    rows = [scaling.measure(args, sharding.make_mesh(count)) for count in (1, 8)]
    assert rows[0]["embeddings"] == rows[0]["gradient"] == rows[0]["rest"] == 0
    embeddings = 4 * 16 * clip.embed_dim
    assert rows[1]["embeddings"] == 7 / 8 * embeddings * (1 + 2)  # gathered, and reduced back
    trained = 8 * (clip.vision_width + clip.text_width)  # tokens of a layer each
    assert rows[1]["gradient"] == 7 / 8 * 2 * 4 * trained
    assert rows[0]["flops"] == pytest.approx(rows[1]["flops"], rel=0.01)
    machine = scaling.MACHINES["h100"]
    sent = machine.seconds([Collective(**c) for c in rows[1]["collectives"]], 8)
    alone, compute = (row["flops"] / (machine.peak * machine.share) for row in rows)
    plain, overlapped = (100 * alone / x for x in (compute + sent, max(compute, sent)))
    last = scaling.times_table(rows, machine).splitlines()[-1]
    assert last.startswith("| 8 |") and last.endswith(f"{plain:.1f} % | {overlapped:.1f} % |")
    assert scaling.bytes_table(rows).count("\n") == 3
