"""Which files are videos: by their names or by how they begin."""

import errno
import os

import pytest

from tests.data import videos
from vop_jax import UserError
from vop_jax.search.files import find_videos

ISO = b"\0\0\0\x20ftyp"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("film.mp4", b"", True),
        ("film.MKV", b"anything", True),
        ("film", ISO + b"isom", True),
        ("film.bak", b"\x1aE\xdf\xa3" + bytes(20), True),
        ("film.dat", b"RIFF\0\0\0\0AVI LIST", True),
        ("sound.wav", b"RIFF\0\0\0\0WAVEfmt ", False),
        ("sound.m4a", ISO + b"M4A ", False),
        ("photo.heic", ISO + b"heic", False),
        ("text.txt", b"text", False),
        ("empty", b"", False),
        (".film.mp4", ISO + b"isom", False),
    ],
)
def test_a_video_is_named_as_one_or_begins_as_one(tmp_path, name, content, found):
    (tmp_path / "other.mp4").touch()
    (tmp_path / name).write_bytes(content)
    assert (name in [file.path for file in find_videos(tmp_path)]) == found


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.mov", "a.mp4", "a.flv", "a.mpg"])
def test_real_files_are_told_without_their_names(tmp_path, name):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video", "flv": "flv"}
    videos.write(tmp_path / name, 4, codec=codec.get(name[2:], "libx264"), rate=25)
    (tmp_path / name).rename(tmp_path / "name")
    assert [file.path for file in find_videos(tmp_path)] == ["name"]


def test_links_that_go_in_circles_are_survived(tmp_path):
    (tmp_path / "sub/deeper").mkdir(parents=True)
    (tmp_path / "sub/a.mp4").touch()
    (tmp_path / "sub/deeper/up").symlink_to(tmp_path)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "sub/a.mp4")
    (tmp_path / "dead.mp4").symlink_to(tmp_path / "none.mp4")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/b.mp4").touch()
    os.mkfifo(tmp_path / "pipe")
    assert [file.path for file in find_videos(tmp_path)] == ["dead.mp4", "link.mp4", "sub/a.mp4"]


def test_a_name_that_is_no_text_is_left_out(tmp_path):
    (tmp_path / "a.mp4").touch()
    with open(os.fsencode(tmp_path) + b"/b\xff.mp4", "wb"):
        pass
    assert [file.path for file in find_videos(tmp_path)] == ["a.mp4"]


def test_known_files_are_not_opened(tmp_path):
    for name in ("known", "unknown"):
        (tmp_path / name).write_bytes(b"no video")
    assert [file.path for file in find_videos(tmp_path, {"known"})] == ["known"]


def test_what_files_are_known_by(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"123")
    os.utime(tmp_path / "a.mp4", ns=(5, 1_700_000_000_123_456_789))
    (found,) = find_videos(tmp_path)
    assert (found.size, found.mtime) == (3, 1_700_000_000_123_456_789)


def test_a_folder_without_videos(tmp_path):
    (tmp_path / "text.txt").touch()
    with pytest.raises(UserError, match="no videos in this folder"):
        find_videos(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    scandir = os.scandir

    def refused(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"/sub: cannot be listed \(Permission denied\)"):
        find_videos(str(tmp_path))
