"""Writing records: what it survives, and that its result is one and the same."""

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.data import calls
from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets import registry
from vop_jax.data.records import encode, example, layout, read, shards, write
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions, pack
from vop_jax.errors import UserError
from vop_jax.video.frames import read_frames

STORED = Preprocessing(4, short_side=32)
HERE = WriteOptions(2, isolated=False, clips_per_shard=3)
SIZES = {"train": 10, "val": 3, "test": 4}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder of seventeen videos."""
    folder = tmp_path_factory.mktemp("films")
    for i in range(sum(SIZES.values())):
        videos.write(folder / f"{i:02}.avi", 12 + i, codec="mpeg4")
    return folder


def dataset(films, *splits):
    """The clips of the films, of all splits or some."""
    names = iter(range(sum(SIZES.values())))
    clips = {
        split: [clip(films / f"{next(names):02}.avi") for _ in range(size)]
        for split, size in SIZES.items()
    }
    return {split: own for split, own in clips.items() if split in (splits or SIZES)}


def clip(path):
    return VideoClip(path.stem, str(path), (f"film {path.stem}", "again"))


def make(clips, root, preprocessing=STORED, **options):
    defaults = {"name": "films", "max_skipped": 1.0, "retry": True, "options": HERE}
    return pack(clips, root, preprocessing, **{**defaults, **options})


def open_splits(root, *splits):
    return read.open_records(root, STORED, splits, name="films", max_skipped=1.0)


@pytest.fixture(scope="module")
def whole(films, tmp_path_factory):
    """All records of the films, which no test changes."""
    root = tmp_path_factory.mktemp("whole")
    make(dataset(films), root)
    return root


@pytest.fixture
def encoded(monkeypatch):
    """Ids of the clips that were encoded, in a list."""
    ids, real = [], encode.encode_clip
    monkeypatch.setattr(
        write, "encode_clip", lambda clip, **options: ids.append(clip.id) or real(clip, **options)
    )
    return ids


def digest(root):
    """{path: hash of the content} of every file below."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def digest_records(root):
    return {path: value for path, value in digest(root).items() if "array_record" in path}


def disk_full(path):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def fail_at(monkeypatch, module, function, call, error):
    """Raises an error in place of one call of a function, counted from 0."""
    real, numbers = getattr(module, function), itertools.count()

    def failing(*args):
        if next(numbers) == call:
            raise error
        return real(*args)

    monkeypatch.setattr(module, function, failing)


def full_at(monkeypatch, name):
    """The disk is full when the shard of that name is opened."""
    real = shards.record_writer

    def writer(path):
        if path.name.startswith(name):
            raise disk_full(path)
        return real(path)

    monkeypatch.setattr(shards, "record_writer", writer)


def test_records_contain_the_sampled_frames_and_tfds_reads_them(films, whole):
    split = open_splits(whole, "test").splits["test"]
    assert split.ids == ["13", "14", "15", "16"] and split.captions[1] == ("film 14", "again")
    builder = tfds.builder_from_directory(os.fspath(layout.find_records(whole)))
    carried = {**dataclasses.asdict(STORED), "uniform_rule": "(a + b - 1) // 2"}
    assert builder.info.metadata["preprocessing"] == carried
    by_name = tfds.data_source("films", split="test", data_dir=os.fspath(whole))
    for i, name in enumerate(split.ids):
        frames = read_frames(films / f"{name}.avi", 4, short_side=32)
        for jpeg, pixels in zip(split[i], frames.pixels, strict=True):
            stored = np.asarray(Image.open(io.BytesIO(jpeg)))
            assert stored.shape == pixels.shape and min(stored.shape[:2]) == 32
            assert np.abs(stored.astype(int) - pixels).mean() < 2
        for source in (builder.as_data_source("test"), by_name):
            record = source[i]
            assert len(source) == 4 and record["id"] == name.encode()
            assert list(record["captions"]) == [f"film {name}".encode(), b"again"]
            assert [int(index) for index in record["indices"]] == frames.indices
            np.testing.assert_allclose([float(t) for t in record["timestamps"]], frames.timestamps)
            assert np.asarray(record["frames"]).shape == (4, *frames.pixels[0].shape)


def test_files_and_records_are_those_of_earlier_versions(films, whole):
    """Records from `tfds` builders (before December 2026) are read, completed and added to."""
    records = whole / "films" / "2.0.0"
    assert {path.name for path in records.iterdir()} == {
        *("dataset_info.json", "features.json", "metadata.json", "shards.json"),
        *("clips-test.jsonl", "clips-train.jsonl", "clips-val.jsonl"),
        *(f"films-test.array_record-0000{i}-of-00002" for i in range(2)),
        *(f"films-train.array_record-0000{i}-of-00004" for i in range(4)),
        "films-val.array_record-00000-of-00001",
    }
    made = json.loads((records / "shards.json").read_text())
    assert made["clips_per_shard"] == 3
    keys = {"split", "file", "clips", "fingerprint", "bytes", "size", "sha256"}
    assert set(made["shards"][0]) == keys
    assert layout.staging_folder(whole, "films") == whole / "films/2.0.0.shards"
    # Ids and captions: the hash that earlier versions wrote into `metadata.json`.
    content = json.dumps([["13", ["film 13", "again"], None, None]])
    expected = hashlib.sha256(content.encode()).hexdigest()
    assert layout.fingerprint([clip(films / "13.avi")]) == expected
    # A record: what the serializer of `tfds` makes of it.
    builder = tfds.builder_from_directory(os.fspath(records))
    features = builder.info.features
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    result = encode.encode_clip(clip(films / "13.avi"), STORED)
    frames = [io.BytesIO(jpeg) for jpeg in result.jpegs]
    values = {"id": "13", "captions": ["film 13", "again"], "frames": frames}
    values |= {"indices": result.indices, "timestamps": result.timestamps}
    by_tfds = serializer.get_tf_example(features.encode_example(values))
    expected = by_tfds.SerializeToString(deterministic=True)
    assert example.serialize(clip(films / "13.avi"), result) == expected


def test_records_that_exist_are_opened_and_not_written_again(films, whole, encoded):
    before = digest(whole)
    assert make(dataset(films), whole).splits["test"].ids == ["13", "14", "15", "16"]
    moved = {"test": [dataclasses.replace(c, path="/moved") for c in dataset(films)["test"]]}
    assert make(moved, whole).splits["test"].ids == ["13", "14", "15", "16"]
    assert digest(whole) == before and not encoded
    inner = layout.find_records(whole)
    assert layout.find_records(inner) == inner  # the folder of the version, too


@pytest.mark.parametrize("failure", ["interrupt", "shard", "note", "metadata"])
def test_an_interrupted_attempt_is_continued(films, whole, encoded, tmp_path, monkeypatch, failure):
    (tmp_path / "films" / "incomplete").mkdir(parents=True)
    mine = tmp_path / "films" / "incomplete" / "of others"
    mine.touch()
    expected = KeyboardInterrupt if failure == "interrupt" else OSError
    with monkeypatch.context() as patch, pytest.raises(expected):
        if failure == "interrupt":
            fail_at(patch, encode, "_jpeg", 30, KeyboardInterrupt)
        elif failure == "shard":
            full_at(patch, "train-00002")
        elif failure == "note":
            fail_at(patch, shards, "write_json", 2, disk_full("note"))
        else:
            fail_at(patch, write, "write_json", 0, disk_full("metadata"))
        one = dataclasses.replace(HERE, workers=1)  # which clips are encoded before it is known
        make(dataset(films), tmp_path, options=one)
    staging = layout.staging_folder(tmp_path, "films")
    finished = len(list(staging.glob("*.json")))
    assert finished == 7 if failure == "metadata" else finished in (1, 2)
    with pytest.raises(UserError, match=r"no records there; .*unfinished: run it again"):
        open_splits(tmp_path, "test")
    encoded.clear()
    make(dataset(films), tmp_path)
    assert len(encoded) == max(0, 17 - 3 * finished)
    mine.unlink()
    assert digest(tmp_path) == digest(whole)


def test_a_clip_whose_file_came_later_is_added_to_an_unfinished_shard(films, tmp_path):
    late = tmp_path / "late.avi"
    clips = {"test": [clip(late), *dataset(films)["test"]]}
    staging = layout.staging_folder(tmp_path / "out", "films")
    (first, _) = shards.plan(clips, staging, STORED, 3)
    (task,) = shards.pending([first])
    shards.write_shard(task, write.encode_clips(task.to_encode, STORED, HERE))
    assert first.note()["clips"][0]["skipped"] == "no such file"
    assert not shards.pending([first])
    shutil.copy(films / "03.avi", late)
    (again,) = shards.pending([first])
    assert again.to_encode == clips["test"][:1]
    assert make(clips, tmp_path / "out").splits["test"].ids[0] == "late"


def test_splits_are_added_even_after_an_interruption(films, whole, encoded, tmp_path, monkeypatch):
    make(dataset(films, "test"), tmp_path)
    with pytest.raises(UserError, match="no records of split 'train'; there are test"):
        open_splits(tmp_path, "train")
    before = digest(tmp_path)
    other = dataclasses.replace(HERE, clips_per_shard=99)  # those that exist have 3
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        full_at(patch, "train-00002")
        make(dataset(films), tmp_path, options=other)
    assert before.items() <= digest(tmp_path).items()
    encoded.clear()
    make(dataset(films), tmp_path, options=other)
    assert len(encoded) == 13 - 2 * 3  # two shards of train were finished
    assert digest_records(tmp_path) == digest_records(whole)
    assert not layout.staging_folder(tmp_path, "films").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_skipped_clip_is_tried_again_when_its_file_has_changed(
    films, whole, encoded, tmp_path, monkeypatch, interrupted
):
    mine, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(films, mine)
    (mine / "03.avi").unlink()
    make(dataset(mine), out)
    (skipped,) = open_splits(out, *SIZES).skipped
    assert skipped["id"] == "03" and skipped["reason"] == "no such file"
    before = digest(out)
    make(dataset(mine), out)
    shutil.rmtree(mine)  # the records need the other videos no more
    mine.mkdir()
    make(dataset(mine), out)
    assert digest(out) == before
    shutil.copy(films / "03.avi", mine)
    encoded.clear()
    if interrupted:  # between a shard and its note, which describes the older file
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            fail_at(patch, shards, "write_json", 0, disk_full("note"))
            make(dataset(mine), out)
        shutil.copytree(films, mine, dirs_exist_ok=True)
    make(dataset(mine), out)
    assert interrupted or encoded == ["03"]
    assert not open_splits(out, *SIZES).skipped
    assert digest_records(out) == digest_records(whole)


def test_a_failed_or_interrupted_replacement_loses_nothing(films, whole, tmp_path, monkeypatch):
    make(dataset(films, "train", "test"), tmp_path)
    before = digest(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at(patch, write, "_write_tfds_metadata", 0, disk_full("records"))
        make(dataset(films), tmp_path)
    now = digest(tmp_path)
    assert {path: now[path] for path in now if ".shards/" not in path} == before
    # Killed between the two renames.
    records = layout.find_records(tmp_path)
    records.rename(records.parent / write.OLD)
    assert layout.find_records(tmp_path) is None
    make(dataset(films, "val"), tmp_path)
    assert digest_records(tmp_path) == digest_records(whole)
    assert [path.name for path in (tmp_path / "films").iterdir()] == [layout.VERSION]


def test_two_writers_at_once_write_the_records_once(films, whole, encoded, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: make(dataset(films), tmp_path), range(2)))
    assert len(encoded) == 17 and digest(tmp_path) == digest(whole)


def test_a_decoder_that_crashes_or_hangs_costs_its_clip(films, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "encode_clip", calls.treacherous)
    clips = [clip(films / "crash.avi"), clip(films / "13.avi")]
    records = make({"test": clips}, tmp_path / "crash", options=WriteOptions(1))
    assert records.splits["test"].ids == ["13"]
    assert records.skipped[0]["reason"] == "its decoder crashed (SIGSEGV)"
    hanging = {"test": [clip(films / "hang.avi")]}
    with pytest.raises(UserError, match=r"its decoder took more than 0.5 s and was stopped"):
        make(hanging, tmp_path / "hang", options=WriteOptions(1, seconds=0.5))


def test_unusable_clips_are_skipped_with_their_reasons(films, encoded, tmp_path):
    (tmp_path / "empty.mp4").touch()
    videos.write_audio(tmp_path / "sound.mp4")
    videos.write(tmp_path / "one.mp4", 1)
    unusable = [clip(tmp_path / f"{name}.mp4") for name in ("empty", "sound", "one", "gone")]
    bad = {"train": [*unusable, *dataset(films)["test"]]}
    with pytest.raises(UserError) as error:
        make(bad, tmp_path / "records", max_skipped=0.05)
    assert "4 of 8 videos cannot be used" in str(error.value)
    assert "config.data.max_skipped=0.05" in str(error.value)
    assert "empty.mp4 (zero bytes), and 3 more" in str(error.value)
    encoded.clear()
    records = make(bad, tmp_path / "records", max_skipped=0.5)
    assert not encoded  # with a higher limit nothing is decoded again
    split = records.splits["train"]
    assert split.ids == ["13", "14", "15", "16"]
    assert [c.id for c in split.skipped] == ["empty", "sound", "one", "gone"]
    reasons = [row["reason"] for row in records.skipped]
    assert reasons[:2] == ["zero bytes", "no video stream"] and reasons[3] == "no such file"
    assert reasons[2].startswith("1 frames, fewer than config.data.frames=4")
    assert np.asarray(Image.open(io.BytesIO(split[3][0]))).shape[0] == 32
    with pytest.raises(UserError, match=r"split 'train': none of 2 videos can be used: .*empty"):
        make({"train": unusable[:2]}, tmp_path / "none")
    repeat = dataclasses.replace(STORED, short_clips="repeat")
    short = make({"train": unusable[2:3]}, tmp_path / "short", repeat)
    assert len(short.splits["train"][0]) == 4 and not short.skipped


def test_rows_without_a_file_are_reported_by_their_line(films, tmp_path, caplog):
    (films / "drawer").mkdir(exist_ok=True)
    reasons = {
        "": "no such file",
        "rtsp://host/x": "an address (rtsp://), not a file",
        "s3://bucket/x.mp4": "Install s3fs",
        "drawer": "a folder without",
        "nul\0.mp4": "not the name of a file",
        "bell\a.mp4": "no such file",
        "half \ud800.mp4": "not the name of a file",
        "long" * 99: "cannot be opened (File name too long)",
        "13.avi/x.mp4": "no such file",
    }
    rows = [{"video": v, "caption": "x", "split": "test"} for v in (*reasons, "13.avi")]
    annotations = tmp_path / "rows.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips, _ = registry.get("folder").read(annotations, films)
    records = make(clips, tmp_path / "records")
    assert records.splits["test"].ids == ["13.avi"]
    skipped = zip(records.skipped, reasons.values(), strict=True)
    for line, (row, reason) in enumerate(skipped, 1):
        assert row["where"] == f"{annotations}:{line}"
        assert row["reason"].startswith(reason)
        label = layout.label_of(row)
        assert label.isprintable() and f"skipped {label}: {reason}" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_an_os_error(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError) as error, shards.record_writer(tmp_path / "full") as append:
        append(bytes(1000))
    assert error.value.errno == errno.ENOSPC
    for message, code in (("Disk quota exceeded", errno.EDQUOT), ("something else", errno.EIO)):
        with pytest.raises(OSError) as error, shards._disk_errors(tmp_path):
            raise RuntimeError(message)
        assert error.value.errno == code
