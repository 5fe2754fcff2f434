"""Checking a dataset before a run: what it prints, and the exit status."""

import contextlib
import io
import json
import shutil

import pytest

from tests import runs
from tests.data.datasets.official import write_official
from tests.video import videos
from vop_jax.config.base import base_config
from vop_jax.data import check as program
from vop_jax.data import load, prepare
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions

pytestmark = pytest.mark.usefixtures("quiet")

SIZES = {"train": 6, "test": 4}
HERE = WriteOptions(2, isolated=False)
SETTINGS = (
    *("--config.data.frames=4", "--config.data.short_side=32"),
    "--config.data.official_sizes=False",
)


@pytest.fixture(scope="module")
def msrvtt(tmp_path_factory):
    """(annotations, videos, records) of an MSR-VTT of ten videos, one of them damaged."""
    root = tmp_path_factory.mktemp("msrvtt")
    films = root / "videos"
    films.mkdir()
    paths = write_official("msrvtt9k", root / "annotations", SIZES, captions_per_video=3)
    texts = root / "annotations" / "MSRVTT_data.json"
    texts.write_text(texts.read_text().replace("a dog", "a left-hand dog"))  # video 0's
    for i, path in enumerate(p for split in paths.values() for p in split):
        videos.write(films / path, 12 + i)
    (films / paths["train"][2]).write_bytes(b"")
    places = [str(root / name) for name in ("videos", "annotations", "records")]
    stored = Preprocessing(4, short_side=32)
    prepare.prepare("msrvtt9k", *places, stored, HERE, official_sizes=False)
    return root


def check(root, *overrides, records=True, config="configs/msrvtt9k.py:vop"):
    """(exit status, stdout, stderr, the JSON)."""
    written = root / "check.json"
    written.unlink(missing_ok=True)
    argv = [f"--config={runs.ROOT / config}", f"--json={written}", *SETTINGS]
    argv += [f"--config.data.records={root / 'records'}"] if records else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = runs.call(*argv, *overrides, program=program.main)
    found = json.loads(written.read_text()) if written.exists() else None
    return status, out.getvalue(), err.getvalue(), found


def test_a_split_that_is_not_whole(msrvtt):
    status, printed, _, found = check(msrvtt)
    assert status == 1
    assert "train: 1 not usable: zero bytes" in printed
    assert "problem: split 'train': 1 of 6 videos not usable, more than" in printed
    within = check(msrvtt, "--config.data.max_skipped=0.5")
    assert within[0] == 1 and "0.5: a run goes on without them" in within[1]
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert (train["videos"], train["usable"], train["captions"]) == (6, 5, 18)
    assert train["reasons"] == {"zero bytes": 1}
    assert (test["videos"], test["usable"], test["captions"]) == (4, 4, 4)
    assert test["stored_frames"] == [4, 4, 4] and test["video_frames"] == [18, 19, 21]
    assert found["slots"] == 69 and test["cut_captions"] == 0
    assert test["caption_tokens"][0] >= 3
    assert (train["captions_with_sides"], test["captions_with_sides"]) == (3, 0)
    assert "note: train: 3 of 18 captions (16.7 %) say left" in printed
    assert "train with --config.data.flip=False" in printed


def test_sides_are_whole_words():
    said = ["LEFT!", "turn right.", "the leftmost", "a right-hand bend", "righthand", "leftward"]
    said += ["counter-clockwise", "anticlockwise", "Clockwise"]
    other = ["bright lights", "copyright", "a cleft", "leftovers", "clockwork", ""]
    assert load.count_sides([*said, *other]) == len(said)
    data = base_config().data
    assert "9 of 15 captions (60.0 %)" in load.flip_warning(data, [said, other])
    assert not load.flip_warning(data, [other])
    for key in ("flip", "augment"):
        data = base_config().data
        data[key] = False
        assert not load.flip_warning(data, [said])


def test_the_slots_are_the_methods(msrvtt):
    _, printed, _, found = check(msrvtt, "--config.method.text_prefix=70")
    assert found["slots"] == 3
    assert found["splits"]["train"]["cut_captions"] == 18 and "18 (100.0 %)" in printed


def test_records_that_do_not_fit_the_config(msrvtt):
    other = ("--config.data.short_side=48", "--config.data.train_split=training")
    status, printed, _, _ = check(msrvtt, *other)
    assert status == 1
    assert "config.data.train_split='training': no such split; found t" in printed
    assert "records were made with data.short_side=32, the config says 48" in printed
    official = check(msrvtt, "--config.data.official_sizes=True")
    assert official[0] == 1 and "msrvtt9k train has 6 videos, 9,000 are expected" in official[1]


def sources(root, videos="videos"):
    return (
        f"--config.data.annotations={root / 'annotations'}",
        f"--config.data.videos={root / videos}",
    )


def test_without_records_the_videos_are_decoded(msrvtt, monkeypatch):
    monkeypatch.setattr(program, "OPTIONS", HERE)
    other = "--config.data.train_split=training"
    status, printed, _, found = check(msrvtt, *sources(msrvtt), other, records=False)
    assert status == 1
    assert "config.data.train_split='training': no such split; found t" in printed
    assert found["splits"] == check(msrvtt)[3]["splits"]


def test_records_of_the_older_rule_whose_videos_are_gone(msrvtt, tmp_path):
    shutil.copytree(msrvtt / "records", tmp_path / "records")
    (metadata,) = tmp_path.glob("records/*/*/metadata.json")
    made = json.loads(metadata.read_text())
    assert made["preprocessing"].pop("uniform_rule")
    metadata.write_text(json.dumps(made))
    found = check(tmp_path, *sources(msrvtt, "nowhere"))[3]
    assert found["splits"]["train"]["usable"]
    start = f"{tmp_path / 'records'}: the frames were sampled by the older rule"
    assert sum(note.startswith(start) for note in found["notes"]) == 1


def test_wrong_calls(msrvtt, tmp_path):
    status, _, error, _ = check(tmp_path, records=False)
    assert status == 2 and "config.data.records='': no records there" in error
    status, _, error, _ = check(msrvtt, config="configs/msvd.py")
    assert status == 2 and "records of 'msrvtt9k', not of 'msvd'" in error
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        assert runs.call(program=program.main) == 2
    assert "--config=FILE is missing; shipped configs are activitynet," in error.getvalue()
    status, _, error, _ = check(msrvtt, "--config.data.frame=3")
    assert status == 2 and "did you mean config.data.frames?" in error
    assert len(error.strip().splitlines()) == 1
