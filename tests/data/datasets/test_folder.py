"""Annotation files, the good and the bad ones."""

import json

import pytest

from vop_jax.data.datasets.folder import read_folder, video_of
from vop_jax.errors import UserError


@pytest.fixture
def read(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()

    def read(text, name="captions.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_folder(path, videos)

    return read


def test_csv_groups_captions_by_clip(read):
    dataset = read(
        "video,caption,split,start,end\n"
        "a.mp4,a dog,train,,\n"
        'b.mp4,"a cat, asleep",test,1.5,3\n'
        "a.mp4,it runs,train,,\n"
        "a.mp4,it runs,train,,\n"
        "b.mp4,a cat wakes,test,3,\n"
    )
    assert {split: [c.id for c in clips] for split, clips in dataset.items()} == {
        "train": ["a.mp4"],
        "test": ["b.mp4@1.5-3", "b.mp4@3-end"],
    }
    assert dataset["train"][0].captions == ("a dog", "it runs")
    assert dataset["test"][0].captions == ("a cat, asleep",)
    assert (dataset["test"][0].start, dataset["test"][0].end) == (1.5, 3.0)
    assert dataset["train"][0].path.endswith("videos/a.mp4")


def test_json_lines_take_lists(read):
    rows = [
        {"video": "a.mp4", "caption": ["one", "two"], "split": "train", "source": "web"},
        {"video": "b.mp4", "captions": ["three"], "split": "test", "start": None, "end": 2},
    ]
    dataset = read("\n".join(map(json.dumps, rows)) + "\n\n", "captions.jsonl")
    assert dataset["train"][0].captions == ("one", "two")
    assert dataset["test"][0].end == 2.0


def test_parquet_is_read_as_json_lines(read, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"video": "a.mp4", "caption": ["one", "two"], "split": "train", "end": None},
        {"video": "b.mp4", "caption": ["three"], "split": "test", "end": 2.0},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
    dataset = read((tmp_path / "rows").read_bytes(), "captions.parquet")
    assert dataset["train"][0].captions == ("one", "two")
    assert (dataset["test"][0].start, dataset["test"][0].end) == (None, 2.0)
    with pytest.raises(UserError, match="not readable as Parquet"):
        read("video,caption\n", "captions.parquet")


def test_tabs_a_byte_order_mark_and_repeated_columns_that_are_ignored(read):
    header = "\ufeffvideo\tcaption\tsplit\tnote\tnote\n"
    dataset = read(header + "a.mp4\tx, y\ttrain\t1\t2\n", "captions.tsv")
    assert dataset["train"][0].captions == ("x, y",)


def test_without_splits_a_fixed_tenth_is_held_out(read):
    names = [f"{i}.mp4" for i in range(400)]
    text = "video,caption\n" + "".join(f"{n},clip {n}\n" for n in names)
    dataset = read(text)
    assert 20 <= len(dataset["test"]) <= 60
    held_out = {clip.id for clip in dataset["test"]}
    assert held_out.isdisjoint(clip.id for clip in dataset["train"])
    more = read(text + "new.mp4,another\n")  # what was held out stays held out
    assert held_out <= {clip.id for clip in more["test"]}
    few = read("video,caption\na.mp4,x\nb.mp4,y\n")
    assert len(few["train"]) == len(few["test"]) == 1


def test_segments_of_a_video_are_held_out_together(read, caplog):
    rows = "".join(
        f"{i}.mp4,x,{start},{start + 10}\n" for i in range(60) for start in range(0, 50, 5)
    )
    dataset = read("video,caption,start,end\n" + rows)
    train, test = ({clip.path for clip in dataset[split]} for split in ("train", "test"))
    assert train and test and train.isdisjoint(test)
    assert not [record for record in caplog.records if "clips both in" in record.message]
    # A single video is torn apart nevertheless: there is nothing else to hold out.
    alone = read("video,caption,start,end\n0.mp4,x,0,10\n0.mp4,y,10,20\n")
    assert len(alone["train"]) == len(alone["test"]) == 1
    few = read("video,caption,start,end\n0.mp4,x,0,9\n0.mp4,y,9,20\n1.mp4,x,0,9\n1.mp4,y,9,20\n")
    assert len(few["train"]) == len(few["test"]) == 2
    assert len({clip.path for clip in few["test"]}) == 1


def test_the_video_of_a_clip():
    assert video_of("a@b.mp4@2-12.5", 2.0, 12.5) == "a@b.mp4"
    assert video_of("a.mp4@1e-05-end", 1e-5, None) == "a.mp4"
    assert video_of("a@1-2", None, None) == "a@1-2"
    didemo = "54322086@N00_2408.mov"
    assert video_of(didemo, None, 30.0) == didemo


def test_spellings_of_a_path_are_one_video(read, tmp_path, caplog):
    rows = ["./b.mp4/,one,train", "b.mp4,two,train", f"{tmp_path}/videos//b.mp4,three,test"]
    dataset = read("video,caption,split\n" + "\n".join(rows) + "\n")
    assert "videos with clips both in train and in test: 1" in caplog.text
    (clip,) = dataset["train"]
    assert clip.path == f"{tmp_path}/videos/b.mp4"
    assert clip.id == "./b.mp4/" and clip.captions == ("one", "two")
    stored = read("video,caption,split\ngs://bucket/b.mp4,one,train\n")
    assert stored["train"][0].path == "gs://bucket/b.mp4"


def test_names_of_splits(read):
    for split in ("train", "test-dev", "Ünï", "val_1", " train "):
        assert list(read(f"video,caption,split\na.mp4,x,{split}\n")) == [split.strip()]
    for split in ("my split", "val.1", "all", "train+x", "train[:50%]", "../x", "-", "train-"):
        with pytest.raises(UserError, match=r"csv:2: split is .*; a name of letters, digits and _"):
            read(f"video,caption,split\na.mp4,x,{split}\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "video,caption,caption\na.mp4,x,y\n", "c.csv:1: several columns 'caption'"),
        ("c.csv", "", "c.csv:1: no column 'video'; found nothing"),
        ("c.csv", "video,captoin\n", "unknown column 'captoin'; did you mean 'caption'"),
        ("c.csv", "video,caption,spilt\n", "unknown column 'spilt'; did you mean 'split'"),
        ("c.csv", "file,caption\na,b\n", "no column 'video'; found 'file, caption'"),
        ("c.csv", "video,caption\n", "no captions in it"),
        ("c.csv", "video,caption\na.mp4,  \n", "c.csv:2: an empty caption"),
        ("c.csv", "video,caption\na.mp4,x,y\n", "c.csv:2: 3 cells, the header has 2"),
        ("c.csv", 'video,caption\na.mp4,"x\n', "not CSV"),
        ("c.csv", b"video,caption\na.mp4,\xff\xfe\n", "not UTF-8 text"),
        ("c.csv", "video,caption,start\na.mp4,x,soon\n", "c.csv:2: start='soon'; seconds"),
        ("c.csv", "video,caption,start\na.mp4,x,-1\n", "c.csv:2: start='-1'"),
        ("c.csv", "video,caption,start\na.mp4,x,nan\n", "c.csv:2: start='nan'"),
        ("c.csv", "video,caption,start,end\na.mp4,x,3,2\n", "c.csv:2: end=2 is not after start=3"),
        ("c.csv", "video,caption,split\na,x,train\nb,y,\n", "b has no split, other rows do"),
        ("c.jsonl", "{}\n", "c.jsonl:1: no column 'video'"),
        ("c.jsonl", '{"video": "a", "caption": "x", "caption": "y"}', "1: the key 'caption' twice"),
        ("c.jsonl", '{"video": "a", "Video": "b", "caption": "x"}', "1: several columns 'video'"),
        ("c.jsonl", '{"video": "a", "caption": 3}', "c.jsonl:1: caption: a number; a text"),
        ("c.jsonl", '{"video": "a", "caption": []}', "c.jsonl:1: an empty list of captions"),
        ("c.jsonl", '{"video": 1, "caption": "x"}', "c.jsonl:1: video: a number; a text"),
        ("c.jsonl", '[{"video": "a"}]', "c.jsonl:1: a JSON list; one object a line"),
        ("c.jsonl", '\n{"video": ', "c.jsonl:2:11: not JSON (Expecting value); one object a line"),
        ("c.txt", "a b", "annotations are files of type .csv, .tsv"),
    ],
)
def test_bad_files_are_named_with_the_line(read, name, text, message):
    with pytest.raises(UserError) as error:
        read(text, name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such annotation file"):
        read_folder(tmp_path / "no.csv", tmp_path)
    (tmp_path / "c.csv").write_text("video,caption\na.mp4,x\n")
    with pytest.raises(UserError, match="no such folder of videos"):
        read_folder(tmp_path / "c.csv", tmp_path / "nowhere")
