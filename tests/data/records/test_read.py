"""Records: what is in them, what is left out, and when they are refused."""

import dataclasses
import errno
import hashlib
import io
import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets import registry
from vop_jax.data.records import encode, layout, shards, write
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions, pack
from vop_jax.errors import UserError
from vop_jax.video.frames import read_frames

F = 4
PREPROCESSING = Preprocessing(frames=F, short_side=32)
HERE = WriteOptions(workers=2, isolated=False, progress=False, clips_per_shard=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four good films, and four that cannot be used."""
    root = tmp_path_factory.mktemp("videos")
    for i, count in enumerate((10, 12, 24, 9)):
        videos.write(root / f"{i}.mp4", count)
    (root / "empty.mp4").write_bytes(b"")
    videos.write_audio(root / "sound.mp4")
    videos.write(root / "one.mp4", 1)
    return root


def clips(folder, names):
    return [VideoClip(n, str(folder / n), (f"film {n}", "again")) for n in names]


GOOD = ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
BAD = ["empty.mp4", "sound.mp4", "one.mp4", "gone.mp4"]


def make(dataset, directory, preprocessing=PREPROCESSING, **options):
    return pack(dataset, directory, preprocessing, **{"options": HERE, **options})


def test_records_hold_the_sampled_frames(folder, tmp_path):
    made = make({"train": clips(folder, GOOD), "test": clips(folder, ["2.mp4"])}, tmp_path)
    train = made.splits["train"]
    assert train.ids == GOOD and made.skipped == []
    assert train.captions[1] == ("film 1.mp4", "again")
    for i, name in enumerate(GOOD):
        expected = read_frames(folder / name, F, short_side=32).pixels
        stored = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in train[i]]
        assert len(stored) == F
        for jpeg, pixels in zip(stored, expected, strict=True):
            assert jpeg.shape == pixels.shape == (32, 43, 3) or jpeg.shape == (32, 42, 3)
            assert np.abs(jpeg.astype(int) - pixels).mean() < 2


def test_records_are_a_tfds_dataset_that_describes_itself(folder, tmp_path):
    make({"train": clips(folder, GOOD)}, tmp_path)
    builder = tfds.builder_from_directory(os.fspath(layout.find_records(tmp_path)))
    carried = {**dataclasses.asdict(PREPROCESSING), "uniform_rule": "(a + b - 1) // 2"}
    assert builder.info.metadata["preprocessing"] == carried
    example = builder.as_data_source("train")[2]
    assert example["id"] == b"2.mp4" and list(example["captions"]) == [b"film 2.mp4", b"again"]
    frames = read_frames(folder / "2.mp4", F)
    assert [int(i) for i in example["indices"]] == frames.indices
    np.testing.assert_allclose([float(t) for t in example["timestamps"]], frames.timestamps)
    assert np.asarray(example["frames"]).shape[0] == F


def test_records_of_the_older_rule_are_named_read_and_not_added_to(folder, tmp_path, caplog):
    dataset = {"train": clips(folder, GOOD)}
    make(dataset, tmp_path)
    metadata = layout.find_records(tmp_path) / "metadata.json"
    made = json.loads(metadata.read_text())
    del made["preprocessing"]["uniform_rule"]
    metadata.write_text(json.dumps(made))
    assert "older rule" not in caplog.text
    assert make(dataset, tmp_path).splits["train"].ids == GOOD
    assert f"{tmp_path}: the frames were sampled by the older rule (a + b) // 2" in caplog.text
    with pytest.raises(UserError, match=r"cannot be added to: .*older rule .*another folder"):
        make({**dataset, "test": clips(folder, GOOD[:1])}, tmp_path)
    # Of frames that are stored at a rate the rule chooses nothing: they carry none.
    at_a_rate = dataclasses.replace(PREPROCESSING, stored_fps=5.0)
    assert at_a_rate.to_metadata() == dataclasses.asdict(at_a_rate)


def test_records_at_a_rate_are_read_by_linspace_too(folder, tmp_path, caplog):
    """As all were that were made before CLIP4Clip's frames had a rule of their own."""
    dataset = {"train": clips(folder, GOOD)}
    data = dataclasses.asdict(dataclasses.replace(PREPROCESSING, stored_fps=5.0))
    make(dataset, tmp_path, Preprocessing.from_mapping({**data, "sampling": "rand"}))
    linspace = Preprocessing.from_mapping({**data, "sampling": "linspace"})
    assert linspace.sampling == "linspace"
    assert make(dataset, tmp_path, linspace).splits["train"].ids == GOOD
    assert "the frames were stored by their times; CLIP4Clip" in caplog.text
    with pytest.raises(UserError, match="cannot be added to: the frames were stored by their"):
        make({**dataset, "test": clips(folder, GOOD[:1])}, tmp_path, linspace)


def test_a_shard_of_the_older_rule_is_made_again(folder, tmp_path):
    """One that an attempt finished which was cut off before the rule changed."""
    of_today = shards.plan({"train": clips(folder, GOOD)}, tmp_path, PREPROCESSING, 3)
    content = layout.content_of(clips(folder, GOOD[:3]))
    asked = json.dumps([dataclasses.asdict(PREPROCESSING), content])
    assert of_today[0].fingerprint != hashlib.sha256(asked.encode()).hexdigest()


def test_packing_happens_once(folder, tmp_path, monkeypatch):
    dataset = {"train": clips(folder, GOOD)}
    make(dataset, tmp_path)
    monkeypatch.setattr(write, "encode_clip", None)
    assert make(dataset, tmp_path).splits["train"].ids == GOOD


def test_unusable_clips_are_left_out_with_their_reasons(folder, tmp_path):
    dataset = {"train": clips(folder, [*GOOD[:2], *BAD, *GOOD[2:]])}
    with pytest.raises(UserError) as error:
        make(dataset, tmp_path)
    assert "4 of 8 videos cannot be used" in str(error.value)
    assert "config.data.max_skipped=0.05" in str(error.value)
    assert "empty.mp4 (zero bytes), and 3 more" in str(error.value)
    # Nothing is decoded again once the limit is raised.
    made = make(dataset, tmp_path, max_skipped=0.5)
    assert made.splits["train"].ids == GOOD
    assert [c.id for c in made.splits["train"].skipped] == BAD
    reasons = {s["id"]: s["reason"] for s in made.skipped}
    assert reasons["empty.mp4"] == "zero bytes"
    assert reasons["sound.mp4"] == "no video stream"
    assert reasons["gone.mp4"] == "no such file"
    assert reasons["one.mp4"].startswith("1 frames, fewer than config.data.frames=4")
    stored = np.asarray(Image.open(io.BytesIO(made.splits["train"][3][0])))
    assert stored.shape[0] == 32


ROWS = [
    *("", "https://youtu.be/x", "s3://bucket/x.mp4", "drawer", "nul\0.mp4", "bell\a.mp4"),
    *("half \ud800.mp4", "long" * 99, "0.mp4/x.mp4"),
]
REASONS = [
    *("no such file", "an address (https://), not a file", "Install s3fs", "a folder without"),
    *("not the name of a file", "no such file", "not the name of a file"),
    *("cannot be opened (File name too long)", "no such file"),
]


def test_rows_that_cannot_be_files_are_named_and_the_others_go_on(folder, tmp_path, caplog):
    (folder / "drawer").mkdir(exist_ok=True)
    rows = [{"video": name, "caption": "x", "split": "test"} for name in [*ROWS, *GOOD]]
    annotations = tmp_path / "rows.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, _ = registry.get("folder").read(annotations, folder)
    made = make(dataset, tmp_path / "records", max_skipped=0.9)
    assert made.splits["test"].ids == GOOD
    assert [clip.id for clip in made.splits["test"].skipped][1:] == ROWS[1:]
    for line, (skipped, reason) in enumerate(zip(made.skipped, REASONS, strict=True), 1):
        assert skipped["where"] == f"{annotations}:{line}"
        assert skipped["reason"].startswith(reason)
        name = layout.label_of(skipped)
        assert name.isprintable() and f"skipped {name}: {reason}" in caplog.text


def test_short_clips_can_be_used(folder, tmp_path):
    repeat = dataclasses.replace(PREPROCESSING, short_clips="repeat")
    made = make({"train": clips(folder, ["one.mp4"])}, tmp_path, repeat)
    assert len(made.splits["train"][0]) == F and made.skipped == []


def test_a_split_without_any_usable_clip_is_an_error(folder, tmp_path):
    with pytest.raises(UserError, match=r"split 'test': none of 2 videos can be used"):
        make({"test": clips(folder, BAD[:2])}, tmp_path, max_skipped=1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 3}, "data.frames=4, not 3"),
        ({"short_side": 16}, "data.short_side=32, not 16"),
        ({"stored_fps": 1.0}, "data.stored_fps=0.0, not 1.0"),
    ],
)
def test_records_made_otherwise_are_refused(folder, tmp_path, changed, message):
    dataset = {"train": clips(folder, GOOD[:1])}
    make(dataset, tmp_path)
    with pytest.raises(UserError, match="records were made with " + message):
        make(dataset, tmp_path, dataclasses.replace(PREPROCESSING, **changed))


def test_records_of_other_clips_are_refused(folder, tmp_path):
    make({"train": clips(folder, GOOD[:1])}, tmp_path)
    for other in (GOOD[1:2], GOOD[:2]):
        with pytest.raises(UserError, match="of split 'train' were made of other clips"):
            make({"train": clips(folder, other)}, tmp_path)
    moved = [dataclasses.replace(clips(folder, GOOD[:1])[0], path="/elsewhere/0.mp4")]
    assert make({"train": moved}, tmp_path).splits["train"].ids == GOOD[:1]


def test_stored_fps_keeps_all_frames_of_that_rate(folder, tmp_path):
    at_five = dataclasses.replace(PREPROCESSING, stored_fps=5.0)
    made = make({"train": clips(folder, ["2.mp4"])}, tmp_path, at_five)
    assert len(made.splits["train"][0]) == 12  # of 2.4 s


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def full(pixels, quality):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "records")

    dataset = {"train": clips(folder, GOOD)}
    with monkeypatch.context() as patched:
        patched.setattr(encode, "_jpeg", full)
        with pytest.raises(OSError) as error:
            make(dataset, tmp_path)
    root = error.value
    while root.__cause__ is not None and root.errno != errno.ENOSPC:
        root = root.__cause__
    assert root.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]
    assert make(dataset, tmp_path).splits["train"].ids == GOOD
