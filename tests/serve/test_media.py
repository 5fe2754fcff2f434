"""Which files are handed out: indexed ones, inside the folder, whoever swaps them."""

import os

import pytest

from vop_jax.search.catalog import IndexedFile
from vop_jax.serve.media import Gone, open_indexed, open_inside, path_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films" / "sub").mkdir(parents=True)
    (tmp_path / "films" / "sub" / "a.mp4").write_bytes(b"a film")
    (tmp_path / "secret").write_bytes(b"a secret")
    return tmp_path / "films"


def read(folder, path):
    with open_inside(folder, path) as file:
        return file.read()


def test_a_file(folder):
    assert read(folder, "sub/a.mp4") == b"a film"


def test_an_open_file_stays_itself_when_its_name_is_swapped(folder):
    with open_inside(folder, "sub/a.mp4") as file:
        (folder / "sub" / "a.mp4").unlink()
        (folder / "sub" / "a.mp4").symlink_to(folder.parent / "secret")
        with open(path_of(file), "rb") as again:
            assert again.read() == b"a film"


def test_links_inside_the_folder_are_followed(folder):
    (folder / "b.mp4").symlink_to("sub/a.mp4")
    (folder / "other").symlink_to("sub")
    assert read(folder, "b.mp4") == read(folder, "other/a.mp4") == b"a film"


def test_a_folder_that_is_itself_a_link(folder):
    (folder.parent / "link").symlink_to(folder)
    assert read(folder.parent / "link", "sub/a.mp4") == b"a film"


@pytest.mark.parametrize("path", ["../secret", "sub/../../secret", "/etc/passwd", "", "."])
def test_paths_that_lead_out(folder, path):
    with pytest.raises(Gone, match="leads out"):
        open_inside(folder, path)


def test_a_link_that_leads_out(folder):
    (folder / "out.mp4").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to(folder.parent)
    for path in ("out.mp4", "up/secret"):
        with pytest.raises(Gone, match="leads out"):
            open_inside(folder, path)


def test_a_link_that_is_put_there_meanwhile(folder, monkeypatch):
    """Between looking where a path leads and opening it."""
    real = os.path.realpath

    def swapped(path, **kwargs):
        answer = real(path, **kwargs)
        if str(path).endswith("a.mp4"):
            os.unlink(path)
            os.symlink(folder.parent / "secret", path)
        return answer

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(Gone, match="not there"):
        open_inside(folder, "sub/a.mp4")


def test_a_file_that_is_gone(folder):
    with pytest.raises(Gone, match="not there"):
        open_inside(folder, "sub/b.mp4")


def test_what_is_no_file(folder):
    os.mkfifo(folder / "pipe.mp4")
    for path in ("sub", "pipe.mp4"):
        with pytest.raises(Gone, match="no file"):
            open_inside(folder, path)


def record(folder, path):
    state = (folder / path).stat()
    return IndexedFile(1, path, state.st_size, state.st_mtime_ns, None, None)


def test_a_file_as_it_was_indexed(folder):
    with open_indexed(folder, record(folder, "sub/a.mp4")) as file:
        assert file.read() == b"a film"


def write(film):
    film.write_bytes(b"A FILM")


def link_to_another(film):
    (film.parent / "notes.txt").write_bytes(b"notes of mine")
    film.unlink()
    film.symlink_to("notes.txt")


@pytest.mark.parametrize("change", [write, link_to_another])
def test_another_file_in_its_place_was_not_indexed(folder, change):
    file = record(folder, "sub/a.mp4")
    change(folder / "sub/a.mp4")
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(Gone, match="changed since it was indexed"):
        open_indexed(folder, file)
    assert len(os.listdir("/dev/fd")) == before
