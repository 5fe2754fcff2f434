"""The benchmark of the recurrence, on a tiny CLIP."""

import json

import pytest

from benchmarks import recurrence


@pytest.mark.slow
def test_a_share_of_the_step(capsys):
    recurrence.main(["--arch", "tiny", "--frames", "3", "--batch", "2", "--repeats", "1"])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["seconds"]["recurrence"] < 10 and found["share"] > 0
    assert found["share"] == found["seconds"]["recurrence"] / found["seconds"]["step"]
