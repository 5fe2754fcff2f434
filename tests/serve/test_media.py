"""Only indexed files inside the folder are opened, whoever swaps them."""

import os

import pytest

from vop_jax.search.catalog import IndexedFile
from vop_jax.serve.media import FileGone, open_indexed, open_inside, path_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films" / "sub").mkdir(parents=True)
    (tmp_path / "films" / "sub" / "a.mp4").write_bytes(b"a film")
    (tmp_path / "secret").write_bytes(b"a secret")
    return tmp_path / "films"


@pytest.mark.parametrize("path", ["films/sub/a.mp4", "films/b.mp4", "films/up/a.mp4", "link/b.mp4"])
def test_files_and_links_inside_the_folder_are_opened_and_stay_themselves(folder, path):
    (folder / "b.mp4").symlink_to("sub/a.mp4")
    (folder / "up").symlink_to("sub")
    (folder.parent / "link").symlink_to(folder)
    root, _, name = path.partition("/")
    with open_inside(folder.parent / root, name) as file:
        (folder / "sub" / "a.mp4").unlink()
        (folder / "sub" / "a.mp4").symlink_to(folder.parent / "secret")
        with open(path_of(file), "rb") as again:
            assert again.read() == b"a film"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *((path, "leads out") for path in ("../secret", "sub/../../secret", "/etc/passwd", "")),
        *((path, "leads out") for path in ("out.mp4", "up/secret", ".")),
        ("sub/b.mp4", "not there"),
        *((path, "no file") for path in ("sub", "pipe.mp4")),
    ],
)
def test_other_paths_are_refused(folder, path, reason):
    (folder / "out.mp4").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(FileGone, match=reason):
        open_inside(folder, path)


def test_a_link_that_appears_while_a_file_is_opened_is_not_followed(folder, monkeypatch):
    real = os.path.realpath

    def swap(path, **options):
        resolved = real(path, **options)
        if str(path).endswith("a.mp4"):
            os.unlink(path)
            os.symlink(folder.parent / "secret", path)
        return resolved

    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises(FileGone, match="not there"):
        open_inside(folder, "sub/a.mp4")


def test_a_file_that_was_replaced_after_indexing_is_refused(folder):
    film = folder / "sub" / "a.mp4"
    state = film.stat()
    record = IndexedFile(1, "sub/a.mp4", state.st_size, state.st_mtime_ns, None, None)
    with open_indexed(folder, record) as file:
        assert file.read() == b"a film"
    (film.parent / "notes.txt").write_bytes(b"my notes")

    def link():
        film.unlink()
        film.symlink_to("notes.txt")

    descriptors = len(os.listdir("/dev/fd"))
    for change in (lambda: film.write_bytes(b"A FILM"), link):
        change()
        with pytest.raises(FileGone, match="changed since it was indexed"):
            open_indexed(folder, record)
    assert len(os.listdir("/dev/fd")) == descriptors
