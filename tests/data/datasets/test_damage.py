"""Damaged files: whatever happens to them, they are read, or one line says which is wrong."""

import json
import pickle
import random
import re

import pytest

from tests.data.datasets.official import BENCHMARKS, read_benchmark, write_official
from vop_jax.errors import UserError

ROUNDS = 30  # of each benchmark
SIZES = {"train": 4, "val": 3, "test": 3}
VALUES = (None, True, -1, 1e400, float("nan"), 10**400, "", " ", "a\0b", "\ud800", "../x", [], {})


def flip(data, chance):
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def truncate(data, chance):
    return data[: chance.randrange(len(data))]


def drop_and_repeat_lines(data, chance):
    lines = data.splitlines(keepends=True)
    return b"".join(line * chance.choice((0, 1, 1, 1, 2)) for line in lines)


def swap_value(data, chance):
    """Another value in place of a text, a number, or a list or object of such."""
    values = [*re.finditer(rb'"[^"]*"|\b\d+\b|\[[^][]*\]|{[^{}]*}', data)]
    if not values:
        return flip(data, chance)
    start, end = chance.choice(values).span()
    return data[:start] + json.dumps(chance.choice(VALUES)).encode() + data[end:]


DAMAGES = (flip, truncate, drop_and_repeat_lines, swap_value, swap_value)


@pytest.mark.parametrize("name", [*BENCHMARKS, "msvd pickled"])
def test_damaged_files_are_read_or_named(name, tmp_path):
    chance = random.Random(name)
    name, _, pickled = name.partition(" ")
    write_official(name, tmp_path, {split: SIZES[split] for split in BENCHMARKS[name].sizes})
    if pickled:
        captions = tmp_path / "captions_msvd.json"
        value = pickle.dumps(json.loads(captions.read_text()))
        (tmp_path / "raw-captions.pkl").write_bytes(value)
        captions.unlink()
    files = sorted(tmp_path.iterdir())
    outcomes = []
    for _ in range(ROUNDS):
        file = tmp_path / "raw-captions.pkl" if pickled else chance.choice(files)
        whole = file.read_bytes()
        file.write_bytes(chance.choice(DAMAGES)(whole, chance))
        try:
            dataset, notes = read_benchmark(name, tmp_path, official_sizes=False)
        except UserError as error:
            message = str(error)
            assert message.isprintable(), message
            assert any(f"{path}" in message for path in files), message
            outcomes.append("named")
        else:
            assert all(note.isprintable() for note in notes)
            for clip in [clip for clips in dataset.values() for clip in clips]:
                assert clip.captions and all(text.strip() for text in clip.captions)
                assert "\0" not in f"{clip}".encode().decode()  # nor half a character
            outcomes.append("read")
        file.write_bytes(whole)
    assert set(outcomes) == {"named", "read"}
