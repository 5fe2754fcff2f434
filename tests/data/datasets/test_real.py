"""The official files themselves, from a folder that VOP_JAX_ANNOTATIONS names."""

import os

import pytest
from etils import epath

from tests.data.datasets.official import read_benchmark
from vop_jax.data.datasets.msrvtt9k import train_ids
from vop_jax.data.datasets.parsing import AnnotationFiles
from vop_jax.data.datasets.source import SplitSize

VARIABLE = "VOP_JAX_ANNOTATIONS"


@pytest.fixture
def real():
    """A function from names of files to the folder that has them all."""

    def folder(*names):
        if not os.environ.get(VARIABLE):
            pytest.skip(f"{VARIABLE} names no folder of official annotation files")
        path = epath.Path(os.environ[VARIABLE])
        for name in names:
            if not AnnotationFiles(path).find_optional((name, name.partition("_")[2])):
                pytest.skip(f"{VARIABLE}: no {name} in {path}")
        return path

    return folder


@pytest.mark.parametrize(("part", "videos"), [("9k", 9000), ("7k", 7010)])
def test_msrvtt_lists(real, part, videos):
    name = f"MSRVTT_train.{part}.csv"
    folder = real(name, "MSRVTT_JSFUSION_test.csv")
    files = AnnotationFiles(folder)
    train = train_ids(files, folder / name)
    assert (len(train), files.notes) == (videos, [])
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
        ("activitynet", "test", ["activitynet_val_1.json"], (4917, 4917)),
        ("lsmdc", "test", ["LSMDC16_challenge_1000_publictect.csv"], (1000, 1000)),
        ("msvd", "train", ["msvd_train_list.txt", "captions_msvd.json"], (1200, 48_774)),
        ("msvd", "val", ["msvd_val_list.txt", "captions_msvd.json"], (100, 4290)),
        ("msvd", "test", ["msvd_test_list.txt", "captions_msvd.json"], (670, 27_763)),
    ],
)
def test_published_sizes(real, name, split, files, size):
    dataset, _ = read_benchmark(name, real(*files), splits=[split])
    captions = sum(len(clip.captions) for clip in dataset[split])
    assert SplitSize(len(dataset[split]), captions) == SplitSize(*size)
