"""Which files are videos: by their names or by their first bytes."""

import errno
import os

import pytest

from tests.video import videos
from vop_jax import UserError
from vop_jax.search.scan import VideoFile, find_videos

ISO = b"\0\0\0\x20ftyp"
PACKET = b"G@\0\x10\0" + bytes(183)  # of MPEG-TS


def paths(folder, indexed=()):
    return [file.path for file in find_videos(str(folder), indexed).files]


@pytest.mark.parametrize(
    ("name", "content", "is_video"),
    [
        ("film.mp4", b"", True),
        ("film.MKV", b"anything", True),
        ("cam.MTS", bytes(4) + PACKET, True),
        ("cam.ts", PACKET, True),
        ("source.ts", b"export const a = 1;", False),
        ("source.mts", "export const ä = 1;".encode(), False),
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
def test_a_video_has_the_name_or_the_first_bytes_of_one(tmp_path, name, content, is_video):
    (tmp_path / "other.mp4").touch()
    (tmp_path / name).write_bytes(content)
    assert (name in paths(tmp_path)) == is_video


def test_real_files_without_their_names(tmp_path):
    codecs = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video", "flv": "flv"}
    endings = ["mkv", "webm", "avi", "mov", "mp4", "flv", "mpg"]
    for ending in endings:
        videos.write(tmp_path / f"a.{ending}", 4, codec=codecs.get(ending, "libx264"), rate=25)
        (tmp_path / f"a.{ending}").rename(tmp_path / ending)
    assert paths(tmp_path) == sorted(endings)


def test_links_pipes_and_names_that_are_no_text(tmp_path):
    (tmp_path / "sub/deeper").mkdir(parents=True)
    (tmp_path / "sub/a.mp4").touch()
    (tmp_path / "sub/deeper/up").symlink_to(tmp_path)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "sub/a.mp4")
    (tmp_path / "dead.mp4").symlink_to(tmp_path / "none.mp4")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/b.mp4").touch()
    os.mkfifo(tmp_path / "pipe")
    with open(os.fsencode(tmp_path) + b"/b\xff.mp4", "wb"):
        pass
    assert paths(tmp_path) == ["dead.mp4", "link.mp4", "sub/a.mp4"]


def test_indexed_files_are_not_opened(tmp_path, monkeypatch):
    for name in ("indexed", "other"):
        (tmp_path / name).write_bytes(b"no video")
    os.utime(tmp_path / "indexed", ns=(5, 1_700_000_000_123_456_789))
    scan = find_videos(tmp_path, {"indexed"})
    assert scan.files == [VideoFile("indexed", 8, 1_700_000_000_123_456_789)]
    with pytest.raises(UserError, match="no videos in this folder"):
        find_videos(tmp_path)

    def fail(path, **options):
        if os.fspath(path).endswith("indexed"):
            raise OSError(errno.ENODEV, "No such device")
        return stat(path, **options)

    stat = os.stat
    monkeypatch.setattr(os, "stat", fail)
    assert paths(tmp_path, {"indexed"}) == ["indexed"]  # its drive disappeared: it is not gone


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Files in it, or in one that disappears, are not known to be gone."""
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
