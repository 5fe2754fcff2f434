"""A dataset is one file: one is added, prepared, checked and loaded here."""

from tests.video import videos
from vop_jax.config import base
from vop_jax.data import check, datasets, load, prepare

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


def test_a_file_in_the_folder_is_a_dataset(tmp_path, monkeypatch):
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
