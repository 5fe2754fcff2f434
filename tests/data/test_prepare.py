"""The command that prepares records; `test_write.py` tests the writing itself."""

import os
import signal
import sys

import pytest
import tensorflow_datasets as tfds

from tests import processes
from tests.data.datasets.official import write_official
from tests.video import videos
from vop_jax.config import base
from vop_jax.data import check, datasets, load, prepare
from vop_jax.data.records import layout
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions
from vop_jax.errors import UserError
from vop_jax.storage.files import folder_lock

NEW = """
from vop_jax.data.datasets.source import Benchmark, SplitSize

FILES = {"train": ("train.csv",), "test": ("test.csv",)}

def read_split(files, split):
    path = files.find(FILES[split])
    captions = files.captions_of_rows(path, files.read_csv(path, ("clip", "text")))
    return files.clips((path, list(captions)), (path, captions), "{}.mp4".format)

SIZES = {"train": SplitSize(3, 3), "test": SplitSize(2, 2)}
DATASET = Benchmark("toy", "Toy, test", SIZES, FILES, read_split)
"""


@pytest.fixture(scope="module")
def msvd(tmp_path_factory):
    """(annotations, videos) of an MSVD of seven videos."""
    root = tmp_path_factory.mktemp("msvd")
    films = root / "videos"
    films.mkdir()
    paths = write_official("msvd", root / "annotations", {"train": 4, "test": 2, "val": 1})
    for i, path in enumerate(p for split in paths.values() for p in split):
        videos.write(films / path, 12 + i, codec="mpeg4")
    return root / "annotations", films


def command(msvd, output, *options):
    annotations, films = msvd
    places = (f"--annotations={annotations}", f"--videos={films}", f"--output={output}")
    stored = ("--other_sizes", "--frames=4", "--short_side=32")
    return ["--dataset=msvd", *places, *stored, "--workers=2", "--clips_per_shard=3", *options]


def content(root):
    """{name: content} of the finished records."""
    return {path.name: path.read_bytes() for path in layout.find_records(root).iterdir()}


def test_the_command_reports_and_repeats_nothing(msvd, tmp_path, capsys, caplog, quiet):
    caplog.set_level("INFO", "absl")
    assert prepare.main(command(msvd, tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "train: 4 of 4 videos, 8 captions" in out
    assert "packing msvd" in err and "7/7" in err
    assert "about" in caplog.text and "free in" in caplog.text
    before = content(tmp_path)
    assert prepare.main(command(msvd, tmp_path)) == 0
    assert content(tmp_path) == before
    records = layout.find_records(tmp_path)
    assert records.parent.name == "msvd"
    assert len(tfds.builder_from_directory(str(records)).as_data_source("train")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--videos=/nowhere"], "/nowhere"),
        (["--annotations=/nowhere"], "/nowhere"),
        (["--dataset=didemo"], "train_data.json"),
        (["--splits=dev"], "msvd has no split 'dev'; there are train, val, test"),
        (["--dataset=didemo64"], "its records are --dataset=didemo --frames=64"),
        (["--dataset=msr-vtt9k"], "did you mean msrvtt9k?"),
        (["--dataset=clips"], "no dataset 'clips'"),
        (["--video=x"], "--video=x"),
        (["--frames=0"], "'0': a number, 1 or more"),
        (["--jpeg_quality=101"], "1 to 100"),
        (["--output=/dev/null/x"], "/dev/null"),
        (["--output=gs://bucket/x"], "a folder of this machine is needed"),
        (["--dataset=folder"], "a folder; an annotation file is needed"),
    ],
)
def test_a_wrong_call_is_one_line(msvd, tmp_path, options, message, capsys):
    assert prepare.main(command(msvd, tmp_path, *options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_wrong_videos_and_a_busy_folder_leave_nothing_in_the_way(tmp_path):
    films, out = tmp_path / "films", tmp_path / "out"
    films.mkdir()
    videos.write(films / "0.mp4", 8)
    (tmp_path / "captions.csv").write_text("video,caption,split\n0.mp4,one,test\n")

    def call(folder):
        options = WriteOptions(1, isolated=False)
        captions = str(tmp_path / "captions.csv")
        return prepare.prepare("folder", folder, captions, str(out), Preprocessing(4), options)

    with pytest.raises(UserError, match=r"none of the 1 videos is there; first .*csv:2: "):
        call(str(tmp_path))
    with folder_lock(out, "busy"), pytest.raises(UserError, match="another process is making the"):
        call(str(films))
    assert prepare.report(call(str(films))) == "test: 1 of 1 videos, 1 captions"


@pytest.mark.parametrize(
    ("signum", "moment"),
    [
        (signal.SIGINT, "msvd test: 2 videos"),  # while the processes start
        pytest.param(signal.SIGKILL, "packing msvd", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_command_is_continued(msvd, tmp_path, signum, moment):
    """The signal goes to the whole group, as a terminal sends Ctrl-C."""
    program = [sys.executable, "-m", "vop_jax.data.prepare", *command(msvd, tmp_path)]
    process = processes.Process(program)
    for line in process.stderr:
        assert "flag parsing" not in line
        if moment in line:
            break
    os.killpg(process.pid, signum)
    printed = process.stderr.read()
    status = process.wait()
    assert "Traceback" not in printed
    if status == 130:
        assert printed.strip().splitlines()[-1] == "stopped by SIGINT; the same command continues"
    else:  # it may have been done
        assert status in (0, -signum)
    assert prepare.main(command(msvd, tmp_path)) == 0
    records = layout.find_records(tmp_path)
    assert len(tfds.builder_from_directory(str(records)).as_data_source("train")) == 4
    assert [path.name for path in records.parent.iterdir()] == [layout.VERSION]


@pytest.mark.filterwarnings("ignore")  # Beam's own, and those of the protobuf it pins
def test_beam_writes_the_same_bytes(msvd, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    beam, here = tmp_path / "beam", tmp_path / "here"
    assert prepare.main(command(msvd, beam, "--beam_options=--runner=DirectRunner")) == 0
    assert prepare.main(command(msvd, here)) == 0
    assert content(beam) == content(here)


def test_a_file_in_the_folder_is_a_dataset(tmp_path, monkeypatch):
    """A dataset is one file: one is added, prepared, checked and loaded here."""
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path)])
    (tmp_path / "toy.py").write_text(NEW)
    for split, clips in (("train", "abc"), ("test", "de")):
        rows = [f"{clip},a film of {clip}\n" for clip in clips]
        (tmp_path / f"{split}.csv").write_text("clip,text\n" + "".join(rows))
        for clip in clips:
            videos.write(tmp_path / f"{clip}.mp4", 8)
    places = [f"--{key}={tmp_path}" for key in ("annotations", "videos")]
    output = f"--output={tmp_path / 'records'}"
    options = ("--frames=4", "--short_side=32", "--workers=1")
    assert prepare.main(["--dataset=toy", *places, output, *options]) == 0
    config = base.base_config()
    config.data.update(kind="toy", records=str(tmp_path / "records"), frames=4, short_side=32)
    packed = load.load(config.data, str(tmp_path / "run"))
    assert {name: split.ids for name, split in packed.splits.items()} == {
        "train": ["a", "b", "c"],
        "test": ["d", "e"],
    }
    assert check.check(config)["problems"] == []
