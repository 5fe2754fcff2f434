"""Finding datasets; what holds for the official files of every benchmark."""

import json
import os

import pytest

from tests.data.datasets.official import (
    BENCHMARKS,
    read_benchmark,
    sentences,
    write_official,
)
from vop_jax.data.datasets import registry
from vop_jax.errors import UserError

SIZES = {"train": 5, "val": 2, "test": 3}
OFFICIAL = os.environ.get("VOP_JAX_ANNOTATIONS")  # a folder of the official files themselves


def sizes_of(name):
    return {split: SIZES[split] for split in BENCHMARKS[name].sizes}


def test_unknown_datasets_splits_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="kind='msrvt': no such dataset; allowed are activitynet, "):
        registry.get("msrvt")
    with pytest.raises(UserError, match=r"didemo, .*, vatex; did you mean 'msrvtt9k'\?"):
        registry.get("msrvtt9")
    with pytest.raises(UserError, match="kind='parsing': no such dataset"):  # a file beside them
        registry.get("parsing")
    with pytest.raises(UserError, match="msrvtt9k has no split 'val'; there are train, test"):
        read_benchmark("msrvtt9k", tmp_path, splits=["val"])
    with pytest.raises(UserError, match="no such folder of annotations"):
        read_benchmark("msrvtt9k", tmp_path / "nowhere")


def test_the_registry_imports_only_the_dataset_asked_for(monkeypatch):
    imported = []
    monkeypatch.setattr(registry, "_load", lambda name: imported.append(name) or BENCHMARKS[name])
    assert registry.get("msvd") is BENCHMARKS["msvd"] and imported == ["msvd"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_miniature_is_read_as_it_was_written(name, tmp_path):
    paths = write_official(name, tmp_path, sizes_of(name))
    dataset, notes = read_benchmark(name, tmp_path, official_sizes=False)
    assert {split: [clip.path for clip in clips] for split, clips in dataset.items()} == paths
    # Nothing is noted but the sizes, where these are known.
    known = [split for split, size in BENCHMARKS[name].sizes.items() if size.videos]
    assert len(notes) == len(known) and all("are expected" in note for note in notes)
    for path in list(tmp_path.iterdir()):
        if name in ("msvd", "activitynet", "didemo", "vatex") and "captions" not in path.name:
            path.rename(tmp_path / f"{name}_{path.name}")  # also accepted
    assert read_benchmark(name, tmp_path, official_sizes=False)[0] == dataset
    if not known:
        return
    with pytest.raises(UserError) as error:
        read_benchmark(name, tmp_path)
    assert f"{name} train has 5 videos, " in str(error.value)
    assert f"{BENCHMARKS[name].sizes['train'].videos:,} are expected" in str(error.value)
    assert "config.data.official_sizes=False (prepare: --other_sizes) allows it" in str(error.value)
    assert BENCHMARKS[name].files["train"][-1] in str(error.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_split_is_read_alone(name, tmp_path):
    sizes = sizes_of(name)
    for split, size in sizes.items():
        folder = tmp_path / split
        write_official(name, folder, {split: size})
        dataset, _ = read_benchmark(name, folder, splits=[split], official_sizes=False)
        assert [*dataset] == [split] and len(dataset[split]) == size
        other = next(name for name in sizes if name != split)
        with pytest.raises(UserError, match=r"no .* in this folder of annotations"):
            read_benchmark(name, folder, splits=[other], official_sizes=False)


def test_official_sizes_pass_with_their_tolerance(tmp_path):
    didemo, msvd = BENCHMARKS["didemo"], BENCHMARKS["msvd"]
    didemo.check_sizes({"train": (8395 - 41, 8395 + 41), "test": (1004, 1004)})
    BENCHMARKS["vatex"].check_sizes({"train": (1, 1)})
    with pytest.raises(UserError, match="didemo train has 8,353 videos, about 8,395"):
        didemo.check_sizes({"train": (8353, 8395)})
    with pytest.raises(UserError, match="didemo test has 1,003 videos, 1,004"):
        didemo.check_sizes({"test": (1003, 1004)})
    with pytest.raises(UserError, match="msvd test has 27,762 captions, 27,763"):
        msvd.check_sizes({"test": (670, 27762)})
    write_official("msvd", tmp_path, {"test": 670}, captions_per_video=1)
    file = tmp_path / "captions_msvd.json"
    captions = json.loads(file.read_text())
    next(iter(captions.values())).extend(["again"] * (27_763 - 670))
    file.write_text(json.dumps(captions))
    dataset, notes = read_benchmark("msvd", tmp_path, splits=["test"])
    assert not notes  # and repeated captions are counted, as published counts do
    assert len(dataset["test"][0].captions) == 27_763 - 669


@pytest.mark.skipif(not OFFICIAL, reason="VOP_JAX_ANNOTATIONS names no folder")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_official_files_have_the_published_sizes(name):
    for split in BENCHMARKS[name].sizes:
        try:
            assert read_benchmark(name, OFFICIAL, splits=[split])[0][split]
        except UserError as error:
            assert "in this folder of annotations" in str(error)  # it lacks files of the split


def test_a_video_in_two_splits_is_an_error(tmp_path):
    write_official("msvd", tmp_path, sizes_of("msvd"))
    with (tmp_path / "test_list.txt").open("a") as file:
        file.write("-0000000001_1_10\n")
    message = "test_list.txt: 1 videos, first -0000000001_1_10, are also in train_list.txt"
    with pytest.raises(UserError, match=message):
        read_benchmark("msvd", tmp_path, official_sizes=False)


def test_protocols_name_what_is_tested_on():
    assert BENCHMARKS["msrvtt9k"].protocol == "MSR-VTT-9k, test 1k-A"
    assert "val_1" in BENCHMARKS["activitynet"].protocol
    assert len({benchmark.protocol for benchmark in BENCHMARKS.values()}) == len(BENCHMARKS)


def test_paragraphs_are_one_caption(tmp_path):
    write_official("activitynet", tmp_path, sizes_of("activitynet"))
    dataset, _ = read_benchmark("activitynet", tmp_path, official_sizes=False)
    assert dataset["test"][0].captions == (" ".join(f"{text}." for text in sentences(5, 2)),)
    assert dataset["test"][0].end is None
    write_official("didemo", tmp_path, sizes_of("didemo"), 3)
    dataset, _ = read_benchmark("didemo", tmp_path, official_sizes=False)
    assert dataset["train"][4].captions == (" ".join(sentences(4, 3)),)
    assert {(clip.start, clip.end) for clip in dataset["val"]} == {(None, 30.0)}
