"""What is particular to one benchmark's files, and what is wrong with them or damaged."""

import json
import os
import pickle
import random
import re

import pytest

from tests.data.datasets.official import BENCHMARKS, read_benchmark, sentence, write_official
from vop_jax.errors import UserError

SIZES = {"train": 5, "val": 2, "test": 3}


@pytest.fixture
def folder(tmp_path, request):
    """Of the benchmark `request.param`."""
    splits = BENCHMARKS[request.param].sizes
    write_official(request.param, tmp_path, {split: SIZES[split] for split in splits})
    return tmp_path


def of(name):
    """The fixture's folder holds this benchmark."""
    return pytest.mark.parametrize("folder", [name], indirect=True)


def read(name, folder):
    dataset, notes = read_benchmark(name, folder, official_sizes=False)
    return dataset, [note for note in notes if "expected" not in note]


def edit(path, change):
    """Rewrites a file: text to text, JSON to JSON where the change returns no text."""
    text = path.read_text()
    if path.suffix == ".json":
        value = json.loads(text)
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))
    else:
        path.write_text(change(text))


@of("msrvtt9k")
def test_msrvtt_captions_and_what_its_test_needs(folder):
    dataset, _ = read("msrvtt9k", folder)
    assert dataset["train"][1].captions == (sentence(1, 0), sentence(1, 1))
    assert [dataset["test"][0].id, *dataset["test"][0].captions] == ["video5", sentence(5, 0)]
    (folder / "MSRVTT_data.json").unlink()
    (folder / "MSRVTT_data.json").mkdir()  # which is no file
    dataset, _ = read_benchmark("msrvtt9k", folder, splits=["test"], official_sizes=False)
    assert len(dataset["test"]) == 3
    with pytest.raises(UserError, match=r"no MSRVTT_data.json in this folder"):
        read("msrvtt9k", folder)


@of("msrvtt9k")
def test_msrvtt_files_of_two_versions_are_noted(folder):
    path = folder / "MSRVTT_JSFUSION_test.csv"
    edit(path, lambda text: text.replace("a fish", "A  Fish"))  # the same, normalised
    assert read("msrvtt9k", folder)[1] == []
    edit(path, lambda text: text.replace("A  Fish", "some fish"))
    (note,) = read("msrvtt9k", folder)[1]
    assert note.startswith("MSRVTT_JSFUSION_test.csv: 1 sentences not among the captions")
    assert "(first video5)" in note and "of one version?" in note
    edit(folder / "MSRVTT_train.9k.csv", lambda text: text + "video6\n")
    with pytest.raises(UserError, match=r"MSRVTT_JSFUSION_test.csv: 1 videos, first video6"):
        read("msrvtt9k", folder)


@of("msrvtt9k")
def test_repeated_and_unknown_ids_are_noted(folder):
    edit(folder / "MSRVTT_train.9k.csv", lambda text: text + "video2\n\nvideo77\n")
    dataset, notes = read("msrvtt9k", folder)
    assert len(dataset["train"]) == 5
    assert notes == [
        "MSRVTT_train.9k.csv: 1 id (first 'video2') repeated (line 7); merged",
        "MSRVTT_train.9k.csv: 1 id (first 'video77') without a caption in MSRVTT_data.json, "
        "left out",
    ]
    with pytest.raises(UserError, match=r"has 5 videos.*first 'video77'"):
        read_benchmark("msrvtt9k", folder)


@of("msvd")
def test_empty_captions_are_noted_and_left_out(folder):
    def change(captions):
        captions["-0000000000_1_9"] = [" ", ""]
        captions["-0000000001_1_10"][0] = "\n"

    edit(folder / "captions_msvd.json", change)
    dataset, notes = read("msvd", folder)
    assert dataset["train"][0].id == "-0000000001_1_10"
    assert dataset["train"][0].captions == (sentence(1, 1),)
    assert notes == [
        "captions_msvd.json: 3 empty captions left out, first of -0000000000_1_9",
        "train_list.txt: 1 id (first '-0000000000_1_9') without a caption in "
        "captions_msvd.json, left out",
    ]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("was_here",)


@of("msvd")
def test_msvd_reads_pickles_and_runs_no_code_of_them(folder, monkeypatch):
    expected, _ = read("msvd", folder)
    captions = json.loads((folder / "captions_msvd.json").read_text())
    (folder / "captions_msvd.json").unlink()
    pickled = folder / "raw-captions.pkl"
    for value in (captions, {k: [c.split() for c in own] for k, own in captions.items()}):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            pickled.write_bytes(pickle.dumps(value, protocol))
            assert read("msvd", folder)[0] == expected
    monkeypatch.chdir(folder)
    pickled.write_bytes(pickle.dumps({"a": [Harmful()]}))
    with pytest.raises(UserError, match=r"raw-captions.pkl: no pickle of plain data .*mkdir"):
        read("msvd", folder)
    assert not (folder / "was_here").exists()
    pickled.write_bytes(pickle.dumps({"a": [1, {2}]}))
    with pytest.raises(UserError, match=r"raw-captions.pkl: a: a number; a text is needed"):
        read("msvd", folder)


@of("didemo")
def test_didemo_names_may_differ_in_their_extension(folder):
    edit(folder / "train_list.txt", lambda text: text.replace(".mov", ".mp4"))
    dataset, notes = read("didemo", folder)
    assert notes == []
    assert dataset["train"][1].path == "1@N00_00001_ab.mp4"
    assert dataset["train"][1].id == "1@N00_00001_ab"
    edit(folder / "train_list.txt", lambda text: text + "1@N00_00001_ab.avi\n")
    _, (note,) = read("didemo", folder)
    assert "1 id (first '1@N00_00001_ab.avi') under a second extension, left out" in note


@of("activitynet")
def test_activitynet_ids_are_compared_and_repeated_keys_noted(folder):
    edit(folder / "val_ids.json", lambda ids: [*ids[1:], "v_more"])
    assert read("activitynet", folder)[1] == [
        "val_ids.json: 1 id (first 'v_more') not in val_1.json",
        "val_1.json: 1 id (first 'v_00000000005') not in val_ids.json",
    ]
    (folder / "val_ids.json").unlink()
    text = (folder / "val_1.json").read_text()
    twice = '{"v_00000000005": {"sentences": ["x"]},' + text.lstrip()[1:]
    (folder / "val_1.json").write_text(twice)
    dataset, (note,) = read("activitynet", folder)
    assert note == "val_1.json: 1 key (first 'v_00000000005') repeated; the last one counts"
    assert dataset["test"][0].captions[0].startswith("a fish")


@of("lsmdc")
def test_lsmdc_quotes_encoding_and_repeats(folder):
    path = folder / "LSMDC16_annos_val.csv"
    first = path.read_bytes().split(b"\n")[0]
    path.write_bytes(path.read_bytes() + first.replace(b"SOMEONE", b"Ren\xe9") + b"\r\n")
    dataset, notes = read("lsmdc", folder)
    assert notes == [
        "LSMDC16_annos_val.csv: not UTF-8 text (invalid continuation byte at byte "
        f"{path.read_bytes().index(0xE9)}); read as cp1252",
        f"LSMDC16_annos_val.csv: 1 id (first '{first.split(bytes([9]))[0].decode()}') "
        "repeated (line 3); merged",
    ]
    rest = f'said "{sentence(5, 0)}'
    assert dataset["val"][0].captions == (f"SOMEONE {rest}", f"René {rest}")
    assert dataset["val"][0].path == "0002_A_FILM/" + dataset["val"][0].id + ".avi"


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


def with_entry(key, value):
    return lambda whole: {**whole, key: value}


TRAIN, TEST, CAPTIONS = "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv", "MSRVTT_data.json"
NULL = [{"video_id": "video1", "caption": None}]
WRONG = [
    ("msrvtt9k", TRAIN, lambda text: "", ":1: no column 'video_id'; found nothing"),
    ("msrvtt9k", TRAIN, replaced("video_id", "id"), "found 'id'"),
    ("msrvtt9k", TRAIN, replaced("video2", "../x"), ":4: '../x'; the name of a"),
    ("msrvtt9k", TRAIN, replaced("video2", "a\0b"), r":4: 'a\x00b'; the name"),
    ("msrvtt9k", TRAIN, lambda text: "video_id\n", "no video with captions for"),
    ("msrvtt9k", TEST, replaced('"a ', "a, "), ":2: 5 cells, the header"),
    ("msrvtt9k", TEST, replaced('0"\n', "0\n"), "not CSV"),
    ("msrvtt9k", CAPTIONS, lambda v: v["sentences"], "a list; an object is needed"),
    ("msrvtt9k", CAPTIONS, lambda v: {"videos": []}, "no key 'sentences'; found 'videos'"),
    ("msrvtt9k", CAPTIONS, with_entry("sentences", {}), "sentences: an object; a list"),
    ("msrvtt9k", CAPTIONS, with_entry("sentences", [{}]), "sentences[0]: no key 'video_id'"),
    ("msrvtt9k", CAPTIONS, with_entry("sentences", NULL), "sentences[0]: caption: null; a text"),
    ("didemo", "val_data.json", lambda v: {"a": 1}, "val_data.json: an object; a list is needed"),
    ("didemo", "val_data.json", lambda v: [{"video": "a.mov"}], "[0]: no key 'description'"),
    ("didemo", "val_list.txt", replaced("5@N00", "a/5@N00"), ":1: 'a/5@N00_00005_ab.mov'; the"),
    ("activitynet", "train.json", lambda v: [v], "train.json: a list; an object is needed"),
    ("activitynet", "train.json", with_entry("v_x", {}), "v_x: no key 'sentences'; found"),
    ("activitynet", "train.json", with_entry("v_x", {"sentences": [1]}), "v_x: a number; a text"),
    ("activitynet", "train_ids.json", lambda v: {"a": v}, "train_ids.json: an object; a list"),
    ("lsmdc", "LSMDC16_annos_val.csv", replaced("\t", " "), ":1: 5 cells between tabs, 6 are"),
    ("lsmdc", "LSMDC16_annos_val.csv", replaced("-01.00", ""), ":1: clip '0002_A_FILM_00"),
    ("msvd", "captions_msvd.json", with_entry("x", "a cat"), "x: a text; a list is needed"),
    ("msvd", "captions_msvd.json", with_entry("x", [float("nan")]), "x: a number; a text"),
    ("msvd", "captions_msvd.json", with_entry("x", ["\ud800"]), "x: a caption with a NUL or half"),
    ("vatex", "ref_captions.json", lambda v: "text", "ref_captions.json: a text; an object is"),
    ("vatex", "test_list.txt", lambda text: " \n", "test_list.txt: no video with captions for"),
    ("vatex", "ref_captions.json", b'{"a": [', ":1:8: not JSON (Expecting value)"),
    ("vatex", "ref_captions.json", b'{"a": ["x"],\n "b"}', ":2:5: not JSON"),
    ("vatex", "ref_captions.json", b"", ":1:1: not JSON"),
    ("vatex", "ref_captions.json", b'{"\xff": 1}', "not UTF-8 text (invalid start byte at byte 2)"),
    ("vatex", "ref_captions.json", b"[" * 100_000, "too deeply nested"),
    ("vatex", "ref_captions.json", b'{"a": ' + b"9" * 5000 + b"}", "a number is too long"),
]


@pytest.mark.parametrize(("folder", "file", "change", "message"), WRONG, indirect=["folder"])
def test_wrong_files_are_named_with_the_place(folder, file, change, message, request):
    if isinstance(change, bytes):
        (folder / file).write_bytes(change)
    else:
        edit(folder / file, change)
    with pytest.raises(UserError) as error:
        read(request.node.callspec.params["folder"], folder)
    assert message in str(error.value)
    assert f"{folder / file}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


ROUNDS = 30  # of damage to each benchmark
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
    """Whatever happens to a file, it is read, or one line says which is wrong."""
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
