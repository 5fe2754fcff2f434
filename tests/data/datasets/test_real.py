"""The official files themselves, from a folder that VOP_JAX_ANNOTATIONS names."""

import os

import pytest
from etils import epath

from vop_jax.data.datasets.msrvtt import read_train_list
from vop_jax.data.datasets.parsing import Size, find_optional
from vop_jax.data.datasets.registry import read_benchmark

VARIABLE = "VOP_JAX_ANNOTATIONS"


@pytest.fixture
def real():
    """A function from names of files to the folder that has them all."""

    def folder(*names):
        if not os.environ.get(VARIABLE):
            pytest.skip(f"{VARIABLE} names no folder of official annotation files")
        path = epath.Path(os.environ[VARIABLE])
        for name in names:
            if not find_optional(path, (name, name.partition("_")[2])):
                pytest.skip(f"{VARIABLE}: no {name} in {path}")
        return path

    return folder


@pytest.mark.parametrize(("part", "videos"), [("9k", 9000), ("7k", 7010)])
def test_msrvtt_lists(real, part, videos):
    name = f"MSRVTT_train.{part}.csv"
    folder = real(name, "MSRVTT_JSFUSION_test.csv")
    notes: list[str] = []
    train = read_train_list(folder / name, notes)
    assert (len(train), notes) == (videos, [])
    dataset, notes = read_benchmark(f"msrvtt{part}", folder, splits=["test"])
    assert not notes or all("one version" in note for note in notes)
    assert {clip.id for clip in dataset["test"]}.isdisjoint(train)


@pytest.mark.parametrize("part", ["9k", "7k"])
def test_msrvtt_captions(real, part):
    folder = real("MSRVTT_data.json", f"MSRVTT_train.{part}.csv", "MSRVTT_JSFUSION_test.csv")
    assert set(read_benchmark(f"msrvtt{part}", folder)[0]) == {"train", "test"}


@pytest.mark.parametrize(
    ("name", "split", "files", "size"),
    [
        ("activitynet", "test", ["activitynet_val_1.json"], Size(4917, 4917)),
        ("lsmdc", "test", ["LSMDC16_challenge_1000_publictect.csv"], Size(1000, 1000)),
        ("msvd", "train", ["msvd_train_list.txt", "captions_msvd.json"], Size(1200, 48_774)),
        ("msvd", "val", ["msvd_val_list.txt", "captions_msvd.json"], Size(100, 4290)),
        ("msvd", "test", ["msvd_test_list.txt", "captions_msvd.json"], Size(670, 27_763)),
    ],
)
def test_published_sizes(real, name, split, files, size):
    dataset, _ = read_benchmark(name, real(*files), splits=[split])
    captions = sum(len(clip.captions) for clip in dataset[split])
    assert Size(len(dataset[split]), captions) == size
