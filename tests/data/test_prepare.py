"""Preparing records: the command, what it survives, and that its result is one and the same."""

import errno
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
import tensorflow_datasets as tfds

from tests import processes
from tests.data import calls
from tests.data.datasets.official import write_official
from tests.video import videos
from vop_jax.data import prepare
from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets import registry
from vop_jax.data.records import layout, read, shards, write
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions, pack
from vop_jax.errors import UserError
from vop_jax.storage.files import folder_lock

SIZES = {"train": 10, "test": 4}


@pytest.fixture(scope="module")
def msvd(tmp_path_factory):
    """(annotations, videos) of an MSVD of fourteen videos."""
    root = tmp_path_factory.mktemp("msvd")
    films = root / "videos"
    films.mkdir()
    paths = write_official("msvd", root / "annotations", {**SIZES, "val": 3})
    for i, path in enumerate(p for split in paths.values() for p in split):
        videos.write(films / path, 12 + i, codec="mpeg4")
    return root / "annotations", films


def command(msvd, output, *options):
    annotations, films = msvd
    return [
        "--dataset=msvd",
        f"--annotations={annotations}",
        f"--videos={films}",
        f"--output={output}",
        "--other_sizes",
        "--frames=4",
        "--short_side=32",
        "--workers=2",
        "--clips_per_shard=3",
        *options,
    ]


@pytest.fixture(scope="module")
def whole(msvd, tmp_path_factory):
    """All of its records, which no test changes."""
    root = tmp_path_factory.mktemp("whole")
    assert prepare.main(command(msvd, root)) == 0
    return root


def digest(root):
    """Of every file below: name and content."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != ".lock")
    assert files
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_command(msvd, tmp_path):
    program = [sys.executable, "-m", "vop_jax.data.prepare", *command(msvd, tmp_path / "a")]
    printed = processes.run(program, check=True)
    assert "train: 10 of 10 videos, 20 captions" in printed.stdout
    assert "about" in printed.stderr and "free in" in printed.stderr
    assert "packing msvd" in printed.stderr and "17/17" in printed.stderr
    assert "flag parsing" not in printed.stderr
    made = layout.find_records(tmp_path / "a")
    assert made.parent.name == "msvd"
    source = tfds.builder_from_directory(str(made)).as_data_source("train")
    assert len(source) == 10 and len(source[0]["frames"]) == 4
    # The same again does nothing; in one process with other shards it has the same content.
    before = digest(tmp_path / "a")
    assert prepare.main(command(msvd, tmp_path / "a")) == 0
    assert digest(tmp_path / "a") == before
    assert prepare.main(command(msvd, tmp_path / "b", "--clips_per_shard=100")) == 0
    other = tfds.builder_from_directory(str(layout.find_records(tmp_path / "b")))
    for one, same in zip(source, other.as_data_source("train"), strict=True):
        assert one["id"] == same["id"] and list(one["captions"]) == list(same["captions"])
        assert (one["frames"][3] == same["frames"][3]).all()


@pytest.mark.slow
def test_ten_kills_change_nothing(msvd, tmp_path):
    """Each kill comes at a random moment; the shards that were finished are kept."""
    program = (
        "import sys; from tests.data import calls; from vop_jax.data import prepare; "
        "from vop_jax.data.records import write; "
        "write.encode_clip = calls.slow; sys.exit(prepare.main(sys.argv[1:]))"
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd()}

    def start(output):
        argv = [sys.executable, "-c", program, *command(msvd, output)]
        return processes.Process(argv, env=env)

    begin = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    duration = time.monotonic() - begin
    rng = random.Random(0)
    kills = kept = 0
    while kills < 10:
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0.3, 1.0) * duration)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        finished = list(layout.staging_folder(tmp_path / "killed", "msvd").glob("*.json"))
        done = layout.find_records(tmp_path / "killed") is not None
        assert done or len(finished) >= kept
        kept = len(finished)
        if done:  # begin anew: there are more kills to come
            layout.find_records(tmp_path / "killed").rmtree()
            kept = 0
    assert start(tmp_path / "killed").wait() == 0
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_finished_shards_are_not_made_again(msvd, tmp_path, monkeypatch):
    options = WriteOptions(1, isolated=False, progress=False, clips_per_shard=3)
    annotations, films = msvd
    seen = []

    def encode(clip, preprocessing):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append(clip.id)
        return real(clip, preprocessing)

    real = write.encode_clip
    monkeypatch.setattr(write, "encode_clip", encode)
    dataset, _ = registry.get("msvd").read(annotations, films, official_sizes=False)
    with pytest.raises(KeyboardInterrupt):
        pack(dataset, tmp_path, Preprocessing(4), name="msvd", options=options)
    staging = layout.staging_folder(tmp_path, "msvd")
    finished = sorted(p.name for p in staging.glob("*.json"))
    assert finished
    assert layout.find_records(tmp_path) is None
    with pytest.raises(UserError, match=r"no records there; .*unfinished: run it again"):
        read.open_records(tmp_path, Preprocessing(4), ["test"], name="msvd")
    first, seen[:] = list(seen), []

    def again(clip, preprocessing):
        seen.append(clip.id)
        return real(clip, preprocessing)

    monkeypatch.setattr(write, "encode_clip", again)
    pack(dataset, tmp_path, Preprocessing(4), name="msvd", options=options)
    assert len(seen) == 17 - 3 * len(finished)
    assert not {*seen} & {*first[: 3 * len(finished)]}
    assert not staging.exists()


def test_a_decoder_that_crashes_or_hangs_costs_its_clip(msvd, tmp_path, monkeypatch):
    _, films = msvd
    good = sorted(films.iterdir())[:6]
    clips = [VideoClip(p.name, str(p), ("x",)) for p in good]
    clips.insert(2, VideoClip("crash", str(films / "crash.avi"), ("x",)))
    clips.insert(5, VideoClip("hang", str(films / "hang.avi"), ("x",)))
    monkeypatch.setattr(write, "encode_clip", calls.treacherous)
    options = WriteOptions(2, seconds=2, progress=False)
    made = pack({"test": clips}, tmp_path, Preprocessing(4), options=options, max_skipped=0.5)
    assert made.splits["test"].ids == [p.name for p in good]
    assert {s["id"]: s["reason"] for s in made.skipped} == {
        "crash": "its decoder crashed (SIGSEGV)",
        "hang": "its decoder took more than 2 s and was stopped",
    }


def test_a_full_disk_loses_nothing(msvd, whole, tmp_path, monkeypatch, capsys):
    record_file, opened = shards.record_writer, []

    def full(path):
        opened.append(path)
        if len(opened) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return record_file(path)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "record_writer", full)
        assert prepare.main(command(msvd, tmp_path / "full")) == 2
    assert "no space left on the disk; free some, the same command" in capsys.readouterr().err
    assert len(list(layout.staging_folder(tmp_path / "full", "msvd").glob("*.json"))) == 2
    assert prepare.main(command(msvd, tmp_path / "full")) == 0
    assert digest(tmp_path / "full") == digest(whole)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("No space left on device", errno.ENOSPC),
        ("Disk quota exceeded", errno.EDQUOT),
        ("something else", errno.EIO),
    ],
)
def test_what_array_record_tells_of_the_disk(tmp_path, said, code):
    with pytest.raises(OSError) as error, shards._disk_errors(tmp_path):
        raise RuntimeError(said)
    assert error.value.errno == code


def test_array_record_tells_of_a_full_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    (tmp_path / "full").symlink_to("/dev/full")
    with (
        pytest.raises(OSError) as error,
        shards.record_writer(tmp_path / "full") as write,
    ):
        write(bytes(1000))
    assert error.value.errno == errno.ENOSPC


def test_videos_that_came_later_are_taken_up(msvd, tmp_path, monkeypatch):
    """An attempt that was cut off left a clip out; now its file is there."""
    annotations, films = msvd
    dataset, _ = registry.get("msvd").read(
        annotations, films, official_sizes=False, splits=["test"]
    )
    late = tmp_path / "late.avi"
    clips = {"test": [VideoClip("late", str(late), ("x",)), *dataset["test"]]}
    options = WriteOptions(1, isolated=False, progress=False, clips_per_shard=3)
    staged = layout.staging_folder(tmp_path / "out", "folder")
    planned = shards.plan(clips, staged, Preprocessing(4), 3)
    encode = functools.partial(write.encode_clip, preprocessing=Preprocessing(4))
    results = write.in_threads(encode, planned[0].clips, 1)
    shards.write_shard(*shards.pending(planned[:1]), results)
    assert planned[0].note()["clips"][0]["skipped"] == "no such file"
    assert not shards.pending(planned[:1])
    videos.write(late, 12, codec="mpeg4")
    (again,) = shards.pending(planned[:1])
    assert again.to_encode == clips["test"][:1]
    made = pack(clips, tmp_path / "out", Preprocessing(4), options=options)
    assert made.splits["test"].ids[0] == "late"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--videos=/nowhere"], "/nowhere"),
        (["--annotations=/nowhere"], "/nowhere"),
        (["--dataset=didemo"], "train_data.json"),
        (["--splits=dev"], "dev"),
        (["--frames=5"], "records were made with data.frames=4, not 5"),
        (["--short_side=48"], "records were made with data.short_side=32, not 48"),
    ],
)
def test_wrong_calls(msvd, tmp_path_factory, changed, message, capsys):
    output = tmp_path_factory.getbasetemp() / "prepared"
    assert prepare.main(command(msvd, output)) == 0
    assert prepare.main(command(msvd, output, *changed)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_records_of_another_version_are_refused(msvd, tmp_path):
    assert prepare.main(command(msvd, tmp_path, "--splits=test")) == 0
    made = layout.find_records(tmp_path)
    for version, why in (("3.0.0", "newer than this vop_jax"), ("1.0.0", "of an older vop_jax")):
        made = made.rename(made.parent / version)
        with pytest.raises(UserError, match=f"records of version {version}, {why}"):
            read.open_records(tmp_path, Preprocessing(4), ["test"], name="msvd")


def test_what_others_keep_there_is_left_alone(msvd, tmp_path):
    """Folders of the names that `tfds` gives its own."""
    annotations, films = msvd
    mine = tmp_path / "downloads" / "videos"
    shutil.copytree(films, mine)
    (tmp_path / "msvd" / "incomplete_downloads").mkdir(parents=True)
    before = digest(mine)
    assert prepare.main(command((annotations, mine), tmp_path)) == 0
    assert digest(mine) == before
    assert (tmp_path / "msvd" / "incomplete_downloads").is_dir()


def test_finished_records_outlive_whatever_happens_to_the_videos(
    msvd, whole, tmp_path, monkeypatch
):
    annotations, films = msvd
    mine = tmp_path / "films"
    shutil.copytree(films, mine)
    sorted(mine.iterdir())[0].write_bytes(b"")
    out = tmp_path / "out"
    assert prepare.main(command((annotations, mine), out, "--splits=test,train")) == 0
    before = digest(out)
    # Gone, all but one: nothing to be tried again, so nothing changes.
    for i, film in enumerate(sorted(mine.iterdir())):
        if i != 1:
            film.unlink()
    assert prepare.main(command((annotations, mine), out, "--splits=test,train")) == 0
    assert digest(out) == before
    # A completion that fails leaves what there was.
    shutil.copytree(films, mine, dirs_exist_ok=True)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "records")

    with monkeypatch.context() as patched:
        patched.setattr(write, "write_json", fail)
        assert prepare.main(command((annotations, mine), out)) == 2
    kept = layout.find_records(out)
    assert {k: v for k, v in digest(out).items() if ".shards/" not in k} == before
    again = read.open_records(out, STORED, ["train", "test"], name="msvd", max_skipped=1.0)
    assert len(again.splits) == 2
    # Cut off between the two renames.
    kept.rename(kept.parent / write.OLD)
    assert layout.find_records(out) is None
    assert prepare.main(command((annotations, mine), out)) == 0
    records = {k: v for k, v in digest(out).items() if "array_record" in k}
    assert records == {k: v for k, v in digest(whole).items() if "array_record" in k}
    assert [p.name for p in (out / "msvd").iterdir()] == [layout.VERSION]


PACKING = """
import sys
from vop_jax.data.records.write import WriteOptions
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import pack
from vop_jax.data.clips import VideoClip
clips = [VideoClip(path, path, ("x",)) for path in sys.argv[2:]]
options = WriteOptions(2, isolated=False, progress=False, clips_per_shard=2)
assert len(pack({"test": clips}, sys.argv[1], Preprocessing(4), options=options).splits["test"])
"""


def test_two_runs_make_the_same_records_once(msvd, tmp_path):
    _, films = msvd
    argv = [sys.executable, "-c", PACKING, str(tmp_path), *map(str, sorted(films.iterdir()))]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    both = [processes.Process(argv, env=env) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]


def test_splits_can_be_added(msvd, whole, tmp_path, monkeypatch):
    assert prepare.main(command(msvd, tmp_path / "grown", "--splits=test")) == 0
    with pytest.raises(UserError, match="no records of split 'train'; there are test"):
        read.open_records(tmp_path / "grown", STORED, ["train"], name="msvd")
    seen = []
    real = write.in_processes

    def counted(call, tasks, workers, *, seconds):
        tasks = list(tasks)
        seen.extend(clip.id for clip in tasks)
        return real(call, tasks, workers, seconds=seconds)

    monkeypatch.setattr(write, "in_processes", counted)
    assert prepare.main(command(msvd, tmp_path / "grown", "--clips_per_shard=99")) == 0
    assert len(seen) == 13  # of 17: the four test videos were there
    for split in ("train", "val", "test"):
        roots = whole, tmp_path / "grown"
        both = [read.open_records(root, STORED, [split], name="msvd") for root in roots]
        one, other = (made.splits[split] for made in both)
        assert one.ids == other.ids
        assert all(one[i] == other[i] for i in range(len(one)))


def test_cut_off_between_a_shard_and_its_note(msvd, whole, tmp_path, monkeypatch):
    """The file that took the old one's place is not what the old note says."""
    annotations, films = msvd
    mine, out = tmp_path / "films", tmp_path / "out"
    shutil.copytree(films, mine)
    gone = sorted(mine.iterdir())[3]
    content = gone.read_bytes()
    gone.unlink()
    assert prepare.main(command((annotations, mine), out)) == 0
    gone.write_bytes(content)

    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_json", full)
        assert prepare.main(command((annotations, mine), out)) == 2
    assert prepare.main(command((annotations, mine), out)) == 0
    records = {k: v for k, v in digest(out).items() if "array_record" in k}
    assert records == {k: v for k, v in digest(whole).items() if "array_record" in k}


def test_an_addition_that_was_cut_off_is_continued(msvd, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    assert prepare.main(command(msvd, out, "--splits=test")) == 0
    before, encode, writer = digest(out), write.in_processes, shards.record_writer

    def counted(call, tasks, workers, *, seconds):
        done.append(list(tasks))
        return encode(call, done[-1], workers, seconds=seconds)

    def full(path):
        if path.name.startswith("train-00002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return writer(path)

    monkeypatch.setattr(write, "in_processes", counted)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "record_writer", full)
        assert prepare.main(command(msvd, out, "--splits=test,train")) == 2
    assert before.items() <= digest(out).items()
    assert prepare.main(command(msvd, out, "--splits=test,train")) == 0
    first, second = map(len, done)
    assert second == first - 2 * 3  # two shards were finished
    assert not layout.staging_folder(out, "msvd").exists()


STORED = Preprocessing(4, short_side=32)


def test_a_clip_that_was_left_out_is_tried_again_when_its_file_has_changed(msvd, whole, tmp_path):
    annotations, films = msvd
    late = tmp_path / "films"
    shutil.copytree(films, late)
    gone = sorted(late.iterdir())[3]
    content = gone.read_bytes()
    gone.unlink()
    out = tmp_path / "out"
    assert prepare.main(command((annotations, late), out)) == 0
    (skipped,) = json.loads((layout.find_records(out) / "metadata.json").read_text())["skipped"]
    assert skipped["reason"] == "no such file"
    before = digest(out)
    assert prepare.main(command((annotations, late), out)) == 0
    assert digest(out) == before
    shutil.rmtree(late)  # the others are needed no more
    late.mkdir()
    gone.write_bytes(content)
    assert prepare.main(command((annotations, late), out)) == 0
    assert not json.loads((layout.find_records(out) / "metadata.json").read_text())["skipped"]
    records = {k: v for k, v in digest(out).items() if "array_record" in k}
    assert records == {k: v for k, v in digest(whole).items() if "array_record" in k}


def test_a_wrong_folder_of_videos_leaves_nothing_in_the_way(tmp_path, capsys):
    (tmp_path / "films").mkdir()
    videos.write(tmp_path / "films" / "0.mp4", 8)
    (tmp_path / "captions.csv").write_text("video,caption,split\n0.mp4,one,test\n")
    call = [
        "--dataset=folder",
        f"--annotations={tmp_path / 'captions.csv'}",
        f"--output={tmp_path / 'out'}",
        "--frames=4",
        "--workers=1",
    ]
    assert prepare.main([*call, f"--videos={tmp_path}"]) == 2
    assert "none of the 1 videos is there; first" in capsys.readouterr().err
    # The same within a run, which looks at each file.
    clips = {"test": [VideoClip("0", str(tmp_path / "0.mp4"), ("one",))]}
    with pytest.raises(UserError, match=r"split 'test': none of 1 videos can be used: .*no such"):
        pack(clips, tmp_path / "out", Preprocessing(4))
    assert prepare.main([*call, f"--videos={tmp_path / 'films'}"]) == 0


@pytest.mark.parametrize(
    "name",
    ["metadata.json", "shards.json", "features.json", "dataset_info.json", "clips-train.jsonl"],
)
def test_a_file_beside_records_that_was_copied_in_part(msvd, whole, tmp_path, name, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = layout.find_records(tmp_path) / name
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    assert prepare.main(command(msvd, tmp_path)) == 2
    assert f"{file}: damaged; copy the records again" in capsys.readouterr().err


def test_records_that_were_copied_in_part_are_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    made = layout.find_records(tmp_path)
    shard = next(iter(made.glob("msvd-test.array_record-*")))
    content = shard.read_bytes()
    for cut in (content[: len(content) // 2], None):
        shard.unlink()
        if cut is not None:
            shard.write_bytes(cut)
        with pytest.raises(UserError, match=r"msvd-test.* bytes; copy the records again"):
            read.open_records(tmp_path, STORED, ["test"], name="msvd")
    shard.write_bytes(content[:200] + bytes(300) + content[500:])  # of the right size
    read.open_records(tmp_path, STORED, ["test"], name="msvd")
    with pytest.raises(UserError, match=r"msvd-test.*damaged; copy the records again"):
        read.check_content(made, "test")
    index = made / layout.index_name("test")
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"clips-test\.jsonl: damaged"):
        read.open_records(tmp_path, STORED, ["test"], name="msvd")
    read.open_records(tmp_path, STORED, ["train"], name="msvd")
    (made / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"metadata\.json: not there; copy the records again"):
        read.open_records(tmp_path, STORED, ["train"], name="msvd")


def test_the_folder_of_the_version_is_found_too(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    inner = layout.find_records(tmp_path)
    assert layout.find_records(inner) == inner
    assert read.open_records(inner, STORED, ["test"], name="msvd").splits["test"].ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset=didemo64"], "its records are --dataset=didemo --frames=64"),
        (["--dataset=msr-vtt9k"], "did you mean msrvtt9k?"),
        (["--video=x"], "--video=x"),
        (["--frames=0"], "'0': a number, 1 or more"),
        (["--jpeg_quality=101"], "1 to 100"),
        (["--output=/dev/null/x"], "/dev/null"),
        (["--output=gs://bucket/x"], "a folder of this machine is needed"),
        (["--dataset=folder", "--splits=dev"], "annotations"),
    ],
)
def test_wrong_flags_get_one_line(msvd, tmp_path, options, message, capsys):
    assert prepare.main(command(msvd, tmp_path, *options)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and message in told


def test_control_c_is_one_line(msvd, tmp_path):
    """To the whole group, as a terminal sends it, while the processes start."""
    program = [sys.executable, "-m", "vop_jax.data.prepare", *command(msvd, tmp_path)]
    process = processes.Process(program)
    for line in process.stderr:
        if "msvd test: 4 videos" in line:
            break
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    told = process.stderr.read()
    assert process.wait() in (0, 130)  # it may have been done
    assert "Traceback" not in told
    if process.returncode == 130:
        assert told.strip().splitlines()[-1] == "stopped by SIGINT; the same command continues"


def test_two_processes_do_not_share_an_output(msvd, tmp_path, capsys):
    with folder_lock(tmp_path, "busy"):
        assert prepare.main(command(msvd, tmp_path)) == 2
    assert "another process is making these records" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # Beam's own, and those of the protobuf it pins
def test_beam_makes_the_same_bytes(msvd, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    assert prepare.main(command(msvd, tmp_path / "here")) == 0
    beam = command(msvd, tmp_path / "beam", "--beam_options=--runner=DirectRunner")
    assert prepare.main(beam) == 0
    assert digest(tmp_path / "beam") == digest(tmp_path / "here")
