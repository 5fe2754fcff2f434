import collections
import csv
import dataclasses
import functools
import signal
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from etils import epath

from tests import processes
from vop_jax.config.base import base_config
from vop_jax.data import load
from vop_jax.data.datasets import clips as moving
from vop_jax.data.datasets import shapes, stills
from vop_jax.errors import UserError
from vop_jax.video.sampling import sample_indices

OPPOSITE = {"up": "down", "to the left": "to the right"}


def read(annotations: str) -> list[dict[str, str]]:
    with open(annotations, newline="") as file:
        return list(csv.DictReader(file))


def decode(path: Path) -> np.ndarray:
    """uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def centre(picture: np.ndarray, colour: str) -> np.ndarray:
    """(y, x) of the pixels near a colour's own."""
    near = abs(picture.astype(int) - shapes.COLOURS[colour]).max(axis=-1) < 12
    return np.argwhere(near).mean(axis=0)


@pytest.fixture(scope="module")
def clips():
    return moving.clip_items(seed=0, train=768, val=192, test=192)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A few clips on disk: (directory, rows of the annotations)."""
    directory = tmp_path_factory.mktemp("clips")
    return directory, read(moving.render(str(directory), train=5, val=0, test=4))


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_captions_are_distinct_and_closed_under_reversal(clips, split):
    captions = [item.caption for item in clips if item.split == split]
    assert len(set(captions)) == len(captions) == 192
    turned = dict(OPPOSITE) | {back: forth for forth, back in OPPOSITE.items()}
    for caption in captions:
        word = next(word for word in turned if f" {word} " in caption)
        assert caption.replace(f" {word} ", f" {turned[word]} ") in captions


def test_held_out_clips_of_opposite_directions_are_reversals_in_every_pixel(clips):
    items = {item.caption: item for item in clips if item.split == "test"}
    pairs = 0
    for caption, item in items.items():
        for word, opposite in OPPOSITE.items():
            if f" {word} " in caption:
                other = items[caption.replace(f" {word} ", f" {opposite} ")]
                one, two = (
                    item.scene.draw(moving.FRAMES),
                    other.scene.draw(moving.FRAMES),
                )
                np.testing.assert_array_equal(one, two[::-1])
                assert (one != two).any()
                pairs += 1
    assert pairs == 96


def test_eight_uniform_samples_of_a_clip_are_symmetric_in_time():
    middles = sample_indices(moving.FRAMES, 8)
    assert sorted(moving.FRAMES - 1 - middles) == middles.tolist()


def test_a_clip_shows_what_its_caption_says(clips):
    for item in clips[::7]:
        scene, caption = item.scene, item.caption
        ends = scene.draw(2)
        (y0, x0), (y1, x1) = (centre(picture, scene.colour) for picture in ends)
        assert caption.startswith(f"a {scene.colour} {scene.shape} moves ")
        moves = {"up": y0 - y1, "down": y1 - y0, "to the left": x0 - x1, "to the right": x1 - x0}
        said = next(word for word in moves if f" {word} " in caption)
        assert moves[said] == max(moves.values())
        assert (" quickly " in caption) == (moves[said] > 36)
        across = y0 if "the" in said else x0
        third = ("top", "middle", "bottom") if "the" in said else ("left", "middle", "right")
        assert caption.endswith(third[np.argmin(abs(np.array(shapes.THIRDS) - across))])


def test_a_still_shows_what_its_caption_says():
    for item in stills.still_items(0, 60, 0):
        y, x = centre(item.scene.draw(1)[0], item.scene.colour)
        row, column = (np.argmin(abs(np.array(shapes.THIRDS) - at)) for at in (y, x))
        assert item.caption.startswith(stills.PLACES[row][column] + ", a ")
        assert item.caption.endswith(f" {item.scene.colour} {item.scene.shape}")
        assert (" large " in item.caption) == (item.scene.radius > 8)


def test_every_clip_is_inside_the_picture(clips):
    for item in clips:
        for at in (*item.scene.start, *item.scene.end):
            assert 5 <= at <= shapes.SIZE - 5


def test_shapes_can_be_told_apart():
    white = dataclasses.replace(moving.clip_items(0, 1, 0, 0)[0].scene, colour="white")
    drawn = [dataclasses.replace(white, shape=shape).draw(1) for shape in shapes.SHAPES]
    for i, one in enumerate(drawn):
        for two in drawn[:i]:
            assert (abs(one.astype(int) - two).max(axis=-1) > 60).sum() > 20


def test_contrasts_turn_one_thing_of_a_caption(clips):
    captions = {item.caption for item in clips if item.split == "train"}  # every one there is
    for caption in captions:
        turned = moving.contrasts(caption)
        assert set(turned) == {"direction", "speed"}
        for name, other in turned.items():
            assert other in captions - {caption}
            assert moving.contrasts(other)[name] == caption
            assert [colour for colour in shapes.COLOURS if f" {colour} " in other] == [
                caption.split()[1]
            ]
    assert moving.contrasts("a red cross moves slowly up on the left") == {
        "direction": "a red cross moves slowly down on the left",
        "speed": "a red cross moves quickly up on the left",
    }
    with pytest.raises(ValueError, match="none of up, down"):
        moving.contrasts("in the centre, a small red cross")


def test_train_clips_repeat_captions_only_after_a_round(clips):
    train = [item for item in clips if item.split == "train"]
    assert len(train) == 768 and len({item.caption for item in train}) == 768
    twice = collections.Counter(i.caption for i in moving.clip_items(0, 2 * 768, 0, 0))
    assert set(twice.values()) == {2}


def test_train_and_test_show_no_clip_twice(clips):
    seen = {item.scene.draw(2).tobytes() for item in clips}
    assert len(seen) == len(clips)


def test_seeds_differ_and_counts_do_not_matter():
    few, many = moving.clip_items(0, 3, 0, 4), moving.clip_items(0, 9, 0, 8)
    for item in few:
        twin = next(other for other in many if other.video == item.video)
        assert twin.caption == item.caption
        np.testing.assert_array_equal(twin.scene.draw(3), item.scene.draw(3))
    others = moving.clip_items(1, 3, 0, 4)
    assert [item.caption for item in others] != [item.caption for item in few]
    assert not {item.video for item in others} & {item.video for item in few}


def test_files_are_h264_of_what_was_drawn(rendered):
    directory, rows = rendered
    assert collections.Counter(row["split"] for row in rows) == {"train": 5, "test": 4}
    for row, item in zip(rows, moving.clip_items(0, 5, 0, 4), strict=True):
        assert (row["video"], row["caption"], row["split"]) == (
            item.video,
            item.caption,
            item.split,
        )
        with av.open(str(directory / row["video"])) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        drawn = item.scene.draw(moving.FRAMES)
        shown = decode(directory / row["video"])
        assert shown.shape == drawn.shape == (24, 64, 64, 3)
        assert abs(shown.astype(int) - drawn).mean() < 4


def test_stills_are_exact(tmp_path):
    rows = read(stills.render(str(tmp_path), train=3, test=2))
    assert [row["split"] for row in rows] == ["train"] * 3 + ["test"] * 2
    for row, item in zip(rows, stills.still_items(0, 3, 2), strict=True):
        np.testing.assert_array_equal(decode(tmp_path / row["video"]), item.scene.draw(1))


def test_stills_tell_nothing_of_motion(clips):
    words = {word for item in clips for word in item.caption.split()}
    still_words = {word for item in stills.still_items(0, 576, 64) for word in item.caption.split()}
    assert {"moves", "slowly", "quickly", "up", "down"} <= words - still_words
    assert still_words >= {*shapes.COLOURS, *shapes.SHAPES}


def test_equal_seeds_give_equal_files_on_any_number_of_threads(rendered, tmp_path):
    directory, _ = rendered
    moving.render(str(tmp_path), train=5, val=0, test=4, threads=5)
    assert contents(tmp_path) == contents(directory)


def test_a_finished_directory_is_reused_at_once(rendered, monkeypatch):
    directory, _ = rendered
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(shapes.Scene, "draw", never)
    again = moving.render(str(directory), train=5, val=0, test=4)
    assert again == str(directory / shapes.ANNOTATIONS_FILE)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_another_seed_in_the_same_directory_is_not_mistaken_for_it(tmp_path):
    first = read(moving.render(str(tmp_path), train=2, val=0, test=0))
    second = read(moving.render(str(tmp_path), train=2, val=0, test=0, seed=1))
    assert [row["video"] for row in first] != [row["video"] for row in second]
    for row, item in zip(second, moving.clip_items(1, 2, 0, 0), strict=True):
        drawn = item.scene.draw(moving.FRAMES).astype(int)
        assert abs(decode(tmp_path / row["video"]) - drawn).mean() < 4


def test_an_error_stops_rendering_and_leaves_no_annotations(tmp_path, monkeypatch):
    drawn = []

    def fail(scene, frames):
        drawn.append(scene)
        raise OSError("no space left")

    monkeypatch.setattr(shapes.Scene, "draw", fail)
    with pytest.raises(OSError, match="no space"):
        moving.render(str(tmp_path), train=400, val=0, test=0)
    assert len(drawn) < 400
    assert not (tmp_path / shapes.ANNOTATIONS_FILE).exists()


def test_a_file_is_there_whole_or_not_at_all(rendered, tmp_path, monkeypatch):
    root = epath.Path(tmp_path)
    whole_write = type(root).write_bytes

    def half_write(path, data):
        whole_write(path, data[: len(data) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(type(root), "write_bytes", half_write)
        moving.render(str(tmp_path), train=5, val=0, test=4)
    assert not [path for path in root.iterdir() if path.suffix in (".mp4", ".csv")]
    moving.render(str(tmp_path), train=5, val=0, test=4)
    for name, data in contents(rendered[0]).items():
        assert (tmp_path / name).read_bytes() == data


def test_killed_rendering_is_taken_up_again(rendered, tmp_path):
    code = f"from vop_jax.data.datasets import clips; clips.render({str(tmp_path)!r}, train=768)"
    process = processes.Process([sys.executable, "-c", code])
    processes.until(lambda: len(list(tmp_path.glob("train-*.mp4"))) >= 5, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / shapes.ANNOTATIONS_FILE).exists()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("train-*.mp4")}
    assert len(kept) >= 5
    for path in kept:
        assert len(decode(path)) == moving.FRAMES
    rows = read(moving.render(str(tmp_path), train=5, val=0, test=4))
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    for row in rows:
        assert (tmp_path / row["video"]).read_bytes() == (rendered[0] / row["video"]).read_bytes()


@pytest.mark.parametrize(
    "counts", [{"train": -1}, {"test": 3}, {"val": 5}, {"test": 770}, {"test": -2}]
)
def test_impossible_numbers_of_clips_are_refused(tmp_path, counts):
    with pytest.raises(UserError, match=r"clips: train must be 0 or more, val and test even"):
        moving.render(str(tmp_path / "new"), **counts)
    assert not (tmp_path / "new").exists()


def test_impossible_numbers_of_stills_are_refused(tmp_path):
    with pytest.raises(UserError, match="stills: must be 0 or more"):
        stills.render(str(tmp_path), train=-1)


def test_needs_no_jax():
    code = "import sys, vop_jax.data.datasets.shapes; assert not {'jax', 'flax'} & set(sys.modules)"
    processes.run([sys.executable, "-c", code], check=True)


def test_a_run_renders_as_many_as_its_config_says(monkeypatch, tmp_path):
    config = base_config()
    config.data.kind, config.data.rendered = "clips", 6
    monkeypatch.setattr(moving, "render", functools.partial(moving.render, val=2, test=4))
    splits = load.load(config.data, str(tmp_path)).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 4}
