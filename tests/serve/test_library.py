"""Several indexes: names, and one CLIP for all that were made with it."""

import shutil

import pytest

from tests.search import library
from vop_jax.errors import UserError
from vop_jax.serve.library import open_library


@pytest.fixture
def made(films, clip, tmp_path):
    """Two indexes of one CLIP, of 3 frames and of 12."""
    shutil.copytree(films[0], tmp_path / "films")
    (tmp_path / "other").mkdir()
    for directory in ("an index", "other/an index"):
        library.make(tmp_path / directory, tmp_path / "films", None, clip=str(clip))
    return [tmp_path / "an index", tmp_path / "other" / "an index"]


def test_indexes_of_one_clip_share_it(made):
    opened = open_library(list(map(str, made)))
    assert list(opened) == ["an-index", "an-index-2"]
    one, other = (searcher.retriever for searcher in opened.values())
    assert one._backbone is other._backbone
    assert opened["an-index"].text("white")[0] == opened["an-index-2"].text("white")[0]


def test_no_index(tmp_path):
    with pytest.raises(UserError, match="no index"):
        open_library([str(tmp_path)])


def test_prompts_that_are_gone(made, monkeypatch):
    import dataclasses

    from vop_jax.search.index import Index

    real = Index.open

    def second(directory):
        index = real(directory)
        if "other" in str(directory):
            index.info = dataclasses.replace(index.info, prompts="/gone")
        return index

    monkeypatch.setattr(Index, "open", second)
    with pytest.raises(UserError, match="/gone: gone since"):
        open_library(list(map(str, made)))
