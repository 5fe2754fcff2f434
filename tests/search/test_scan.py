"""Which files are videos: by their names or by how they begin."""

import errno
import os

import pytest

from tests.video import videos
from vop_jax import UserError
from vop_jax.search.scan import find_videos

ISO = b"\0\0\0\x20ftyp"
PACKET = b"G@\0\x10\0" + bytes(183)  # of MPEG-TS


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("film.mp4", b"", True),
        ("film.MKV", b"anything", True),
        ("cam.MTS", bytes(4) + PACKET, True),
        ("cam.ts", PACKET, True),
        ("source.ts", b"export const a = 1;", False),
        ("source.mts", "export const ä = 1;".encode(), False),
        ("cam.M2TS", b"", True),
        ("cam.ogv", b"", True),
        ("loop.GIF", b"", True),
        ("film", ISO + b"isom", True),
        ("film", 6 * PACKET, True),
        ("film", 6 * (bytes(4) + PACKET), True),
        ("film", b"G" * 800, False),
        ("film.bak", b"\x1aE\xdf\xa3" + bytes(20), True),
        ("film.dat", b"RIFF\0\0\0\0AVI LIST", True),
        ("sound.wav", b"RIFF\0\0\0\0WAVEfmt ", False),
        ("sound.m4a", ISO + b"M4A ", False),
        ("photo.heic", ISO + b"heic", False),
        ("animation", ISO + b"avis", True),
        ("text.txt", b"text", False),
        ("empty", b"", False),
        (".film.mp4", ISO + b"isom", False),
    ],
)
def test_a_video_is_named_as_one_or_begins_as_one(tmp_path, name, content, found):
    (tmp_path / "other.mp4").touch()
    (tmp_path / name).write_bytes(content)
    assert (name in [file.path for file in find_videos(tmp_path).files]) == found


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.mov", "a.mp4", "a.flv", "a.mpg"])
def test_real_files_are_told_without_their_names(tmp_path, name):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video", "flv": "flv"}
    videos.write(tmp_path / name, 4, codec=codec.get(name[2:], "libx264"), rate=25)
    (tmp_path / name).rename(tmp_path / "name")
    assert [file.path for file in find_videos(tmp_path).files] == ["name"]


def test_links_that_go_in_circles_are_survived(tmp_path):
    (tmp_path / "sub/deeper").mkdir(parents=True)
    (tmp_path / "sub/a.mp4").touch()
    (tmp_path / "sub/deeper/up").symlink_to(tmp_path)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "sub/a.mp4")
    (tmp_path / "dead.mp4").symlink_to(tmp_path / "none.mp4")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/b.mp4").touch()
    os.mkfifo(tmp_path / "pipe")
    assert [file.path for file in find_videos(tmp_path).files] == [
        "dead.mp4",
        "link.mp4",
        "sub/a.mp4",
    ]


def test_a_name_that_is_no_text_is_left_out(tmp_path):
    (tmp_path / "a.mp4").touch()
    with open(os.fsencode(tmp_path) + b"/b\xff.mp4", "wb"):
        pass
    assert [file.path for file in find_videos(tmp_path).files] == ["a.mp4"]


def test_known_files_are_not_opened(tmp_path):
    for name in ("known", "unknown"):
        (tmp_path / name).write_bytes(b"no video")
    assert [file.path for file in find_videos(tmp_path, {"known"}).files] == ["known"]


def test_what_files_are_known_by(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"123")
    os.utime(tmp_path / "a.mp4", ns=(5, 1_700_000_000_123_456_789))
    (found,) = find_videos(tmp_path).files
    assert (found.size, found.mtime) == (3, 1_700_000_000_123_456_789)


def test_a_folder_without_videos(tmp_path):
    (tmp_path / "text.txt").touch()
    with pytest.raises(UserError, match="no videos in this folder"):
        find_videos(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Also one that goes away; what was in it is not known to be gone."""
    for name in ("lost+found", "away", "sub"):
        (tmp_path / name).mkdir()
    for name in ("a.mp4", "lost+found/b.mp4", "sub/c.mp4", "away/d.mp4"):
        (tmp_path / name).write_bytes(b"x")
    scandir, refused = os.scandir, {"lost+found": errno.EACCES, "away": errno.ENOENT}

    def refuse(path):
        name = os.path.basename(os.fspath(path))
        if name in refused:
            raise OSError(refused[name], os.strerror(refused[name]), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    scan = find_videos(str(tmp_path))
    assert [file.path for file in scan.files] == ["a.mp4", "sub/c.mp4"]
    assert scan.unlisted == {
        "lost+found": "Permission denied",
        "away": "No such file or directory",
    }
    assert [path for path in ("away/d.mp4", "sub/e.mp4") if scan.is_gone(path)] == ["sub/e.mp4"]
    refused[tmp_path.name] = errno.EIO
    with pytest.raises(UserError, match=r"cannot be listed \(Input/output error\)"):
        find_videos(str(tmp_path))


def test_a_known_file_whose_drive_goes_away_is_not_gone(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    stat = os.stat

    def fail(path, **given):
        if os.fspath(path).endswith("a.mp4"):
            raise OSError(errno.ENODEV, "No such device", os.fspath(path))
        return stat(path, **given)

    monkeypatch.setattr(os, "stat", fail)
    assert [file.path for file in find_videos(tmp_path, {"a.mp4"}).files] == ["a.mp4", "b.mp4"]
