"""The rendered datasets: clips and stills of shapes."""

import collections
import csv
import functools

import av
import numpy as np
import pytest

from vop_jax.config.base import base_config
from vop_jax.data import load
from vop_jax.data.datasets import clips as moving
from vop_jax.data.datasets import shapes, stills
from vop_jax.errors import UserError
from vop_jax.video.sampling import sample_indices


def read(annotations):
    with open(annotations, newline="") as file:
        return list(csv.DictReader(file))


def decode(path):
    """uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def centre(pixels, colour):
    """(y, x) of the pixels near a colour's own."""
    near = abs(pixels.astype(int) - shapes.COLOURS[colour]).max(axis=-1) < 12
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
def test_clips_of_val_and_test_come_in_pairs_that_are_reversals_in_every_pixel(clips, split):
    items = {item.caption: item for item in clips if item.split == split}
    directions = [moving.DATASET.contrasts(caption)["direction"] for caption in items]
    assert len(items) == 192 and sorted(directions) == sorted(items)
    for (caption, item), other in list(zip(items.items(), directions, strict=True))[::4]:
        one, two = item.scene.draw(6), items[other].scene.draw(6)
        np.testing.assert_array_equal(one, two[::-1])
        assert (one != two).any() and caption != other
    middles = sample_indices(moving.FRAMES, 8)  # the frames that a run takes of a clip
    assert sorted(moving.FRAMES - 1 - middles) == middles.tolist()


def test_a_clip_shows_what_its_caption_says(clips):
    for item in clips[::17]:
        scene, caption = item.scene, item.caption
        (y0, x0), (y1, x1) = (centre(pixels, scene.colour) for pixels in scene.draw(2))
        assert caption.startswith(f"a {scene.colour} {scene.shape} moves ")
        moves = {"up": y0 - y1, "down": y1 - y0, "to the left": x0 - x1, "to the right": x1 - x0}
        direction = next(word for word in moves if f" {word} " in caption)
        assert moves[direction] == max(moves.values())
        assert (" quickly " in caption) == (moves[direction] > 36)
        across = y0 if "the" in direction else x0
        third = ("top", "middle", "bottom") if "the" in direction else ("left", "middle", "right")
        assert caption.endswith(third[np.argmin(abs(np.array(shapes.THIRDS) - across))])
        assert all(5 <= at <= shapes.SIZE - 5 for at in (*scene.start, *scene.end))


def test_a_still_shows_what_its_caption_says_in_words_without_motion(clips):
    items = stills.still_items(0, 576, 64)
    for item in items[::10]:
        y, x = centre(item.scene.draw(1)[0], item.scene.colour)
        row, column = (np.argmin(abs(np.array(shapes.THIRDS) - at)) for at in (y, x))
        assert item.caption.startswith(stills.PLACES[row][column] + ", a ")
        assert item.caption.endswith(f" {item.scene.colour} {item.scene.shape}")
        assert (" large " in item.caption) == (item.scene.radius > 8)
    words = {word for item in clips for word in item.caption.split()}
    still_words = {word for item in items for word in item.caption.split()}
    assert {"moves", "slowly", "quickly", "up", "down"} <= words - still_words
    assert still_words >= {*shapes.COLOURS, *shapes.SHAPES}


def test_contrasts_change_one_thing_of_a_caption(clips):
    captions = {item.caption for item in clips if item.split == "train"}  # every one there is
    for caption in captions:
        changed = moving.DATASET.contrasts(caption)
        assert set(changed) == {"direction", "speed"}
        for name, other in changed.items():
            assert other in captions - {caption}
            assert moving.DATASET.contrasts(other)[name] == caption
            assert other.split()[1] == caption.split()[1]
    assert load.contrasts("clips", ["a red cross moves slowly up on the left"]) == {
        "direction": ["a red cross moves slowly down on the left"],
        "speed": ["a red cross moves quickly up on the left"],
    }
    with pytest.raises(ValueError, match="none of up, down"):
        moving.DATASET.contrasts("in the centre, a small red cross")
    assert load.contrasts("stills", ["in the centre, a small red cross"]) == {}


def test_captions_and_clips_repeat_as_documented(clips):
    train = collections.Counter(i.caption for i in moving.clip_items(0, 2 * 768, 0, 0))
    assert len(train) == 768 and set(train.values()) == {2}
    assert len({item.caption for item in clips if item.split == "train"}) == 768
    assert len({item.scene.draw(2).tobytes() for item in clips}) == len(clips)
    few, many = moving.clip_items(0, 3, 0, 4), moving.clip_items(0, 9, 0, 8)
    twins = {item.video: item for item in many}
    for item in few:
        assert twins[item.video].caption == item.caption
        np.testing.assert_array_equal(twins[item.video].scene.draw(3), item.scene.draw(3))
    others = moving.clip_items(1, 3, 0, 4)
    assert [item.caption for item in others] != [item.caption for item in few]
    assert not {item.video for item in others} & {item.video for item in few}


def test_files_show_what_was_drawn(rendered, tmp_path):
    directory, rows = rendered
    items = moving.clip_items(0, 5, 0, 4)
    assert [row["split"] for row in rows] == ["train"] * 5 + ["test"] * 4
    for row, item in zip(rows, items, strict=True):
        assert [row["video"], row["caption"]] == [item.video, item.caption]
        with av.open(str(directory / row["video"])) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        drawn, shown = item.scene.draw(moving.FRAMES), decode(directory / row["video"])
        assert shown.shape == drawn.shape == (24, 64, 64, 3)
        assert abs(shown.astype(int) - drawn).mean() < 4
    still_rows = read(stills.render(str(tmp_path), train=3, test=2))
    for row, item in zip(still_rows, stills.still_items(0, 3, 2), strict=True):
        np.testing.assert_array_equal(decode(tmp_path / row["video"]), item.scene.draw(1))


def test_a_finished_directory_is_reused_and_another_seed_is_not_mistaken_for_it(
    rendered, tmp_path, monkeypatch
):
    directory, rows = rendered
    moving.render(str(tmp_path), train=5, val=0, test=4, threads=5)
    for path in directory.iterdir():  # the same on any number of threads
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    other = read(moving.render(str(tmp_path), train=2, val=0, test=0, seed=1))
    assert not {row["video"] for row in other} & {row["video"] for row in rows}
    monkeypatch.setattr(shapes.Scene, "draw", None)
    annotations = moving.render(str(directory), train=5, val=0, test=4)
    assert annotations == str(directory / shapes.ANNOTATIONS_FILE)


def test_interrupted_rendering_is_continued(rendered, tmp_path, monkeypatch):
    draw, drawn = shapes.Scene.draw, []

    def fail(scene, frames):
        drawn.append(scene)
        if len(drawn) > 3:
            raise OSError("no space left")
        return draw(scene, frames)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(shapes.Scene, "draw", fail)
        moving.render(str(tmp_path), train=5, val=0, test=4)
    assert not (tmp_path / shapes.ANNOTATIONS_FILE).exists()
    complete = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    assert len(complete) == 3
    assert read(moving.render(str(tmp_path), train=5, val=0, test=4)) == rendered[1]
    for path in tmp_path.glob("*.mp4"):
        assert path.read_bytes() == (rendered[0] / path.name).read_bytes()
        assert path.stat().st_mtime_ns == complete.get(path, path.stat().st_mtime_ns)


def test_impossible_numbers_are_refused(tmp_path):
    for counts in ({"train": -1}, {"test": 3}, {"val": 5}, {"test": 770}, {"test": -2}):
        with pytest.raises(UserError, match="clips: train must be 0 or more, val and test even"):
            moving.render(str(tmp_path / "new"), **counts)
    with pytest.raises(UserError, match="stills: must be 0 or more"):
        stills.render(str(tmp_path / "new"), train=-1)
    assert not (tmp_path / "new").exists()


def test_a_run_renders_as_many_as_its_config_says(monkeypatch, tmp_path):
    config = base_config()
    config.data.update(kind="clips", rendered=6)
    monkeypatch.setattr(moving, "render", functools.partial(moving.render, val=2, test=4))
    splits = load.load(config.data, str(tmp_path)).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 4}
