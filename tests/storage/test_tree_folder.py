"""Trees in orbax folders."""

import pathlib

import jax
import numpy as np
import pytest

from vop_jax.errors import UserError
from vop_jax.storage import files, tree_folder

TREE = {"clip": {"resblocks.0": {"bias": np.arange(3, dtype=np.float32)}, "scale": np.float32(2)}}


def test_round_trip_and_replacement(tmp_path):
    tree_folder.save(tmp_path / "p.orbax", {"old": np.ones(2)}, {"format": "old"})
    tree_folder.save(tmp_path / "p.orbax", TREE, {"format": "x"})
    tree, metadata = tree_folder.load(tmp_path / "p.orbax")
    jax.tree.map(np.testing.assert_array_equal, tree, TREE)
    assert tree["clip"]["resblocks.0"]["bias"].dtype == np.float32
    assert metadata == {"format": "x"}
    assert [f.name for f in tmp_path.iterdir()] == ["p.orbax"]


def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch):
    tree_folder.save(tmp_path / "p.orbax", TREE, {"format": "x"})

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tree_folder, "_checkpointer", full)
    with pytest.raises(OSError, match="No space left"):
        tree_folder.save(tmp_path / "p.orbax", {"new": np.ones(2)}, {})
    monkeypatch.undo()
    assert tree_folder.load(tmp_path / "p.orbax")[1] == {"format": "x"}
    assert [f.name for f in tmp_path.iterdir()] == ["p.orbax"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "metadata.json").unlink(), "not an orbax folder of this project"),
        (lambda p: (p / "metadata.json").write_text("{"), "not a readable orbax folder"),
        (lambda p: (p / "params/_METADATA").unlink(), "no params/_METADATA"),
        (lambda p: (p / "params/manifest.ocdbt").unlink(), "no params/manifest.ocdbt"),
    ],
)
def test_a_torn_folder_is_one_line(tmp_path, spoil, message):
    tree_folder.save(tmp_path / "p.orbax", TREE, {})
    spoil(tmp_path / "p.orbax")
    with pytest.raises(UserError, match=message) as caught:
        tree_folder.load(tmp_path / "p.orbax")
    assert "\n" not in str(caught.value)


def test_a_number_that_is_not_finite_is_named(tmp_path):
    tree_folder.save(tmp_path / "p.orbax", {"a": {"b": np.array([1, np.nan])}}, {})
    with pytest.raises(UserError, match=r"p\.orbax: tensor a/b holds numbers that are not finite"):
        tree_folder.load(tmp_path / "p.orbax")


def test_a_kill_leaves_nothing_in_the_way(tmp_path):
    partial = tmp_path / ".p.orbax.partial"
    partial.mkdir()
    (partial / "half").write_text("x")
    with files.replacing(tmp_path / "p.orbax") as folder:
        assert not (partial / "half").exists()
        folder.mkdir()
    assert [f.name for f in tmp_path.iterdir()] == ["p.orbax"]


def test_a_file_is_replaced_too(tmp_path):
    (tmp_path / "a.pt").write_text("old")
    with pytest.raises(KeyError), files.replacing(tmp_path / "a.pt") as file:
        file.write_text("half")
        raise KeyError
    assert (tmp_path / "a.pt").read_text() == "old"
    with files.replacing(tmp_path / "a.pt") as file:
        file.write_text("new")
    assert (tmp_path / "a.pt").read_text() == "new"


def fill(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)


@pytest.mark.parametrize("goes_wrong", ["the last renaming", "nothing was made"])
def test_a_folder_outlives_one_that_does_not_come(tmp_path, monkeypatch, goes_wrong):
    fill(tmp_path / "f", "old")
    if goes_wrong == "the last renaming":
        monkeypatch.setattr(pathlib.Path, "replace", lambda *_: 1 / 0)
    wrong = pytest.raises((ZeroDivisionError, FileNotFoundError))
    with wrong, files.replacing(tmp_path / "f") as f:
        if goes_wrong == "the last renaming":
            fill(f, "new")
    assert (tmp_path / "f/file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_outlives_a_kill_between_the_renamings(tmp_path):
    fill(tmp_path / "f", "old")
    (tmp_path / ".f.partial").mkdir()
    (tmp_path / "f").rename(tmp_path / ".f.partial/replaced")
    with pytest.raises(KeyError), files.replacing(tmp_path / "f"):
        raise KeyError
    assert (tmp_path / "f/file").read_text() == "old"


def test_a_partial_file_is_not_in_the_way(tmp_path):
    (tmp_path / ".a.partial").write_text("half")
    with files.replacing(tmp_path / "a") as file:
        file.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
