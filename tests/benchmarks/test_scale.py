"""The estimate of a large run agrees with its simulation."""

import dataclasses

import pytest

from benchmarks import scale

PIECES, WORKERS = scale.Pieces(), scale.Workers()


@pytest.mark.parametrize(
    "videos, changes",
    [
        (100_000, {}),
        (1_000_000, {"preemptions": 0.5, "spread": 1.0}),
        (1_000_000, {"preemptions": 2.0, "start": 600.0}),
        (20_000, {"count": 8, "spread": 0.0, "preemptions": 0.0}),
    ],
)
def test_the_estimate_agrees_with_simulations(videos, changes):
    workers = dataclasses.replace(WORKERS, **changes)
    expected = scale.estimate(videos, PIECES, workers)
    for seed in range(3):
        assert scale.simulate(videos, PIECES, workers, seed) == pytest.approx(expected, rel=0.1)


def test_costs_grow_with_videos_and_the_table_has_them(capsys):
    one, two = scale.costs(10**6, PIECES), scale.costs(2 * 10**6, PIECES)
    assert all(two[name] == pytest.approx(2 * one[name]) for name in one)
    assert one["moments"] == 13e6
    assert one["collection, GB of memory"] == pytest.approx(13e6 * (2048 + 200) / 1e9)
    scale.main(["--videos", "100000", "--seeds", "1", "--dim", "256"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | 0.1 million videos |"
    assert f"| collection, GB of memory | {1.3e6 * (1024 + 200) / 1e9:,.0f} |" in lines
