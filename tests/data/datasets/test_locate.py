"""Videos under other names than the official ones."""

import os

import pytest

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.locate import locate
from vop_jax.errors import UserError, VideoError
from vop_jax.video.files import stat


def clips(*paths):
    return [VideoClip(os.path.splitext(os.path.basename(path))[0], path, ("x",)) for path in paths]


@pytest.fixture
def put(tmp_path):
    """Makes files in a folder `videos`, and returns it."""

    def put(*paths):
        for path in paths:
            (tmp_path / "videos" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "videos" / path).touch()
        return tmp_path / "videos"

    return put


def located(found, root):
    return [os.path.relpath(clip.path, root) for clip in found]


def test_official_places_are_taken_without_a_look_elsewhere(put, monkeypatch):
    root = put("video1.mp4", "film/a_00.01.avi", "other/video1.webm")

    def no_walk(*args, **kwargs):
        raise AssertionError("the folder was walked")

    monkeypatch.setattr(os, "walk", no_walk)
    found, notes = locate(clips("video1.mp4", "film/a_00.01.avi"), root)
    assert located(found, root) == ["video1.mp4", "film/a_00.01.avi"]
    assert (found[0].id, found[0].captions) == ("video1", ("x",))
    assert notes == []


def test_other_extensions_places_names_and_frames(put):
    root = put(
        *("video1.mp4", "video2.WEBM", "video2.txt", "more/video3.mp4", "film_00.01.02/1.jpg"),
        *("empty/notes.txt", "abc.mkv"),
    )
    names = ["video1.mp4", "video2.mp4", "video3.mp4", "film/film_00.01.02.avi", "v_abc.mp4"]
    found, notes = locate(clips(*names, "empty.mp4"), root)
    assert located(found, root) == [
        *("video1.mp4", "video2.WEBM", "more/video3.mp4", "film_00.01.02", "abc.mkv"),
        "empty.mp4",  # what is not found is reported when it is to be read
    ]
    assert notes == [
        f"{root}: 2 of 6 videos have another extension, first video2.WEBM",
        f"{root}: 1 of 6 videos lie elsewhere or are renamed, first more/video3.mp4",
        f"{root}: 1 of 6 videos are folders of frames, first film_00.01.02",
        f"{root}: 1 of 6 videos are missing, first empty.mp4",
    ]


def test_names_that_downloads_and_file_systems_change(put):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    names = ["a.mp4", "b.mp4", "x.mov", "c.mp4", "d.avi", f"{composed}.mp4", "e.mp4", "f.mp4"]
    root = put(
        *("a.mp4.webm", "b.mp4.mkv", "x.mov.mp4", "c.ts", "d.M2TS", f"{decomposed}.mp4"),
        *("e.mp4/1.jpg", "sub/e.mp4/2.jpg", "f/._1.jpg", "._f.mp4"),
    )
    found, notes = locate(clips(*names), root)
    assert located(found, root) == [
        *("a.mp4.webm", "b.mp4.mkv", "x.mov.mp4", "c.ts", "d.M2TS", f"{decomposed}.mp4"),
        *("e.mp4", "f.mp4"),
    ]
    assert f"{root}: 1 of 8 videos are missing, first f.mp4" in notes


def test_a_file_of_nearly_that_name_is_pointed_at(put):
    root = put("a.mp4.webm", "b.ts", "cafe\u0301.mp4")
    hints = {"a.mp4": "a.mp4.webm", "b": "b.ts", "caf\u00e9.mp4": r"'cafe\u0301.mp4'"}
    for name, hint in hints.items():
        with pytest.raises(VideoError) as error:
            stat(root / name)
        assert str(error.value) == f"no such file, but there is {hint}"


def test_of_two_the_official_extension_then_the_alphabet(put):
    root = put("b/x.avi", "a/x.mkv", "c/y.webm", "b/y.mov", "y/1.png", "v_z.mov", "z.mp4")
    found, notes = locate(clips("x.avi", "y.mp4", "v_z.mp4"), root)
    assert located(found, root) == ["b/x.avi", "b/y.mov", "v_z.mov"]
    assert f"{root}: 2 of 3 videos are there twice, first b/x.avi and a/x.mkv" in notes


def test_links_are_followed_but_not_in_circles(put, tmp_path):
    root = put("real/one.mp4")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "two.mp4").touch()
    (root / "linked").symlink_to(tmp_path / "disk")
    (root / "real" / "circle").symlink_to(root)
    found, notes = locate(clips("one.mp4", "two.mp4"), root)
    assert located(found, root) == ["real/one.mp4", "linked/two.mp4"]
    assert len(notes) == 1


def test_nothing_found_is_an_error(put, tmp_path):
    root = put("d.mp4", "c.mp4", "b.mp4", "a.txt")
    with pytest.raises(UserError) as error:
        locate(clips("video1.mp4", "video2.mp4"), root)
    message = str(error.value)
    assert message.startswith(f"{root}: none of the 2 videos is in this folder; looked for video1")
    assert ".mp4 .avi .mov" in message
    assert message.endswith("there are 'a.txt', 'b.mp4', 'c.mp4'")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="there are no files"):
        locate(clips("video1.mp4"), tmp_path / "bare")
    with pytest.raises(UserError, match="no such folder of videos"):
        locate(clips("video1.mp4"), tmp_path / "nowhere")
    assert locate([], root) == ([], [])
