"""A file of an index with other bytes: the right answer, or one line that says what to do."""

import random

import numpy as np
import pytest

from tests.search import library
from tests.search.shelf import Shelf
from vop_jax.errors import UserError
from vop_jax.search import catalog
from vop_jax.search.index import Index
from vop_jax.search.scan import VideoFile

E, QUERIES = 8, np.random.default_rng(9).standard_normal((2, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("damage") / "index"
    shelf = Shelf(directory, E)
    rng = np.random.default_rng(0)
    shelf.add(rng.standard_normal((40, E)))
    with shelf.catalog.transaction():
        rows = [(f"caption {i}", f"{i}.mp4", 0.0, 1.0) for i in range(5)]
        shelf.catalog.add_captions(rows, rng.standard_normal((5, E)).astype(np.float32))
        shelf.catalog.add_unreadable(VideoFile("bad.mp4", 1, 2), "no video stream")
    shelf.close()
    return directory


def answers(directory):
    """What a user sees of an index: (what it is, [hits])."""
    index = Index(directory)
    index.open_vectors()
    hits = []
    for to in ("videos", "captions"):
        hits += index.search(QUERIES, 50, to=to)
        hits += index.search(QUERIES, 2, to=to, since=0, until=1, per_file=False)
    return (index.info, index.counts(), index.failures(), index.folder), hits


def damage(path, rng):
    """Changes a file in one of several ways."""
    content = path.read_bytes()
    at = rng.randrange(len(content))
    flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
    odd = np.array([rng.choice([np.nan, np.inf, 1e30])], "<f4").tobytes()
    zeros = bytes(len(content[at : at + 500]))
    changed = [content[:at], b"", content + rng.randbytes(300)]
    for start, new in ((at, flipped), (at, flipped), (at, zeros), (at // 4 * 4, odd)):
        changed.append(content[:start] + new + content[start + len(new) :])
    path.write_bytes(rng.choice(changed))
    if not rng.randrange(8):
        path.unlink()


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_index(whole, tmp_path, seed):
    """Indexing again finds the damage, too, and forgets files whose vectors are lost."""
    right, rng = answers(whole), random.Random(seed)
    directory = library.copy(whole, tmp_path / "index")
    path = rng.choice(sorted(directory.iterdir()))  # no file is empty
    damage(path, rng)
    try:
        assert answers(directory) == right
    except UserError as error:
        assert "\n" not in str(error) and "index" in str(error)
    if path.name == catalog.FILE and (not path.exists() or not path.stat().st_size):
        return  # no index: another one could be made here
    try:
        Shelf(directory, E).close()
    except UserError as error:
        assert path.suffix != ".f32" and "\n" not in str(error)
        return
    for before, after in zip(right[1], answers(directory)[1], strict=True):
        hits = {(hit.path, hit.caption): hit for hit in before}
        if path.suffix != ".f32":
            assert after == before
        elif len(before) > 5:  # these are all hits
            assert all(hits[hit.path, hit.caption] == hit for hit in after)
