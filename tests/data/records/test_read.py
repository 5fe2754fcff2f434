"""Opening records: which are read, and which are refused."""

import dataclasses
import hashlib
import json
import shutil

import pytest

from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.records import layout, read, shards
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions, pack
from vop_jax.errors import UserError

STORED = Preprocessing(frames=4, short_side=32)
HERE = WriteOptions(workers=1, isolated=False, clips_per_shard=2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips."""
    folder = tmp_path_factory.mktemp("films")
    for i, count in enumerate((10, 12, 24)):
        videos.write(folder / f"{i}.mp4", count)
    return [VideoClip(f"{i}", str(folder / f"{i}.mp4"), (f"film {i}",)) for i in range(3)]


def make(dataset, root, preprocessing=STORED):
    return pack(dataset, root, preprocessing, options=HERE)


@pytest.fixture(scope="module")
def written(clips, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    make({"train": clips, "test": clips[:1]}, root)
    return root


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the records that a test may change."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_another_preprocessing_is_refused(written, clips):
    changes = {"frames=4": {"frames": 3}, "short_side=32": {"short_side": 16}}
    changes["stored_fps=0.0"] = {"stored_fps": 1.0}
    for stored, change in changes.items():
        (value,) = change.values()
        message = f"records were made with data.{stored}, not {value}"
        with pytest.raises(UserError, match=message):
            make({"train": clips}, written, dataclasses.replace(STORED, **change))


def test_other_clips_names_and_splits_are_refused(written, clips):
    for other in (clips[1:], clips[:2], [dataclasses.replace(clips[0], captions=("another",))]):
        with pytest.raises(UserError, match="of split 'train' were made of other clips"):
            make({"train": other}, written)
    with pytest.raises(UserError, match=r"records of 'folder', not of 'msvd'; use another"):
        read.open_records(written, STORED, ["train"], name="msvd")
    with pytest.raises(UserError, match="no records of split 'val'; there are train, test"):
        read.open_records(written, STORED, ["val"])


def test_another_version_is_refused(copied):
    records = layout.find_records(copied)
    reasons = {"3.0.0": "newer than this vop_jax", "1.0.0": "of an older vop_jax"}
    for version, reason in reasons.items():
        records = records.rename(records.parent / version)
        with pytest.raises(UserError, match=f"records of version {version}, {reason}"):
            read.open_records(copied, STORED, ["test"])


@pytest.mark.parametrize(
    "name",
    ["metadata.json", "shards.json", "features.json", "dataset_info.json", "clips-train.jsonl"],
)
def test_a_truncated_file_beside_the_records_is_named(copied, name):
    file = layout.find_records(copied) / name
    lines = file.read_bytes().splitlines(keepends=True)
    for content in (b"".join(lines[:-1]), file.read_bytes()[:-9]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="damaged; copy the records again") as error:
            read.open_records(copied, STORED, ["train"])
        assert str(file) in str(error.value)
    if name == "clips-train.jsonl":
        assert read.open_records(copied, STORED, ["test"]).splits["test"].ids == ["0"]
    else:
        file.unlink()
        if name != "dataset_info.json":  # without it the folder is no dataset
            with pytest.raises(UserError, match="not there; copy the records again"):
                read.open_records(copied, STORED, ["train"])


def test_a_truncated_missing_or_damaged_shard_is_named(copied):
    records = layout.find_records(copied)
    (shard,) = records.glob("folder-test.array_record-*")
    content = shard.read_bytes()
    for truncated in (content[: len(content) // 2], None):
        shard.unlink()
        if truncated is not None:
            shard.write_bytes(truncated)
        with pytest.raises(UserError, match=r"folder-test.* bytes; copy the records again"):
            read.open_records(copied, STORED, ["test"])
    shard.write_bytes(content[:200] + bytes(300) + content[500:])  # of the right size
    read.open_records(copied, STORED, ["test"])
    with pytest.raises(UserError, match=r"folder-test.*damaged; copy the records again"):
        read.check_content(records, "test")


def test_records_of_the_older_rule_are_read_and_not_added_to(copied, clips, caplog):
    make({"train": clips}, copied)
    assert "older rule" not in caplog.text
    path = layout.find_records(copied) / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["preprocessing"]["uniform_rule"]
    path.write_text(json.dumps(metadata))
    assert make({"train": clips}, copied).splits["train"].ids == ["0", "1", "2"]
    assert f"{copied}: the frames were sampled by the older rule (a + b) // 2" in caplog.text
    with pytest.raises(UserError, match=r"cannot be added to: .*older rule .*another folder"):
        make({"train": clips, "val": clips[:1]}, copied)
    # The rule chooses none of the frames that are stored at a rate: these have none.
    at_a_rate = dataclasses.replace(STORED, stored_fps=5.0)
    assert at_a_rate.to_metadata() == dataclasses.asdict(at_a_rate)
    # A shard that an interrupted attempt finished before the rule changed is written again.
    of_today = shards.plan({"train": clips}, copied, STORED, 3)
    content = json.dumps([dataclasses.asdict(STORED), layout.content_of(clips)])
    assert of_today[0].fingerprint != hashlib.sha256(content.encode()).hexdigest()


def test_records_at_a_rate_have_all_its_frames_and_are_read_by_linspace_too(
    clips, tmp_path, caplog
):
    """As all were that were made before CLIP4Clip's frames had their own rule."""
    data = dataclasses.asdict(dataclasses.replace(STORED, stored_fps=5.0))
    records = make(
        {"train": clips}, tmp_path, Preprocessing.from_mapping({**data, "sampling": "rand"})
    )
    assert len(records.splits["train"][2]) == 12  # of 2.4 s
    linspace = Preprocessing.from_mapping({**data, "sampling": "linspace"})
    assert linspace.sampling == "linspace"
    assert make({"train": clips}, tmp_path, linspace).splits["train"].ids == ["0", "1", "2"]
    assert "the frames were stored by their times; CLIP4Clip" in caplog.text
    with pytest.raises(UserError, match="cannot be added to: the frames were stored by their"):
        make({"train": clips, "test": clips[:1]}, tmp_path, linspace)


def test_a_part_is_a_split_and_frames_are_found_by_id(written):
    whole = read.open_records(written, STORED, ["train"]).splits["train"]
    part = read.Part(whole, "part", [2, 0])
    assert (part.name, part.ids, len(part)) == ("part", ["2", "0"], 2)
    assert part.captions[0] == ("film 2",) and part[0] == whole[2]
    assert [row["id"] for row in part.rows] == part.ids
    assert read.stored_frames(written, "train", ["1", "x"]) == {"1": whole[1]}
    with pytest.raises(UserError, match="no records of split 'val'"):
        read.stored_frames(written, "val", ["1"])
