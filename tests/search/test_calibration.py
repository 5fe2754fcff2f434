"""The minimum of an index: what is shown is found, and chance is not."""

import numpy as np
import pytest

from tests.search.shelf import Shelf
from vop_jax import UserError
from vop_jax.search import calibration, catalog
from vop_jax.search.index import Index

DIM = 24


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random(count, seed):
    return unit(np.random.default_rng(seed).standard_normal((count, DIM)))


def near(vectors, seed):
    """Texts that describe these moments, about as well as a good model says: cosine 0.9."""
    return unit(vectors + 0.5 * random(len(vectors), seed))


MOMENTS, GENERAL, OTHERS = random(300, 0), random(128, 1), random(200, 2)


class Model:
    """Embeds the general captions, and counts how often."""

    def __init__(self, general=GENERAL):
        self.general, self.calls = general, 0

    def embed_text(self, texts):
        assert len(texts) == len(self.general)
        self.calls += 1
        return self.general


def make(directory, vectors=MOMENTS, model=None, captions=()):
    shelf = Shelf(directory, DIM)
    if len(vectors):
        shelf.add(vectors)
    if len(captions):
        rows = [(f"caption {i}", f"{i}.mp4", 0.0, 2.0) for i in range(len(captions))]
        with shelf.catalog.transaction():
            shelf.catalog.add_captions(rows, captions)
    shelf.catalog.calibrate(model or Model())
    shelf.close()
    return Index(directory)


def found(index, vectors, **options):
    """The share of the vectors that find something."""
    return np.mean([bool(hits) for hits in index.search(vectors, 5, **options)])


@pytest.mark.parametrize("captions", [0, 100])
def test_what_is_shown_is_found_and_other_texts_find_nothing(tmp_path, captions):
    index = make(tmp_path, captions=near(MOMENTS[:captions], 3))
    shown = near(MOMENTS[100:], 4)
    results = index.search(shown, 5, min_score="auto")
    assert [hits[0].path for hits in results] == [f"{i}.mp4" for i in range(100, 300)]
    assert found(index, OTHERS, min_score="auto") < 0.25
    assert found(index, OTHERS) == found(index, OTHERS, min_score="none") == 1
    known = index.calibration()
    assert known.passed < 0.25 and known.captions == captions and known.missed < 0.05


def test_with_captions_both_errors_are_equal(tmp_path):
    captions = unit(MOMENTS + 1.5 * random(300, 3))
    known = make(tmp_path, captions=captions).calibration()
    assert known.captions == 150 and known.missed > 0.02  # every second one is looked at
    assert known.missed == pytest.approx(known.passed, abs=0.02)


def test_general_captions_that_are_shown_do_not_raise_the_minimum(tmp_path):
    plain = make(tmp_path / "plain").calibration()
    shown = np.concatenate([MOMENTS, near(GENERAL[:30], 5)])
    known = make(tmp_path / "shown", shown).calibration()
    assert known.limit == pytest.approx(plain.limit, abs=1.5)  # the upper tenth alone: 4.1
    assert found(Index(tmp_path / "shown"), near(MOMENTS, 4), min_score="auto") == 1


def test_a_number_is_the_least_score(tmp_path):
    index, vectors = make(tmp_path), near(MOMENTS[:9], 4)
    plain = index.search(vectors, 20)
    for value in (0.4, "0.4"):
        results = index.search(vectors, 20, min_score=value)
        assert results == [[hit for hit in hits if hit.score >= 0.4] for hits in plain]
    for value in (2, "x", float("nan"), []):
        with pytest.raises(UserError, match=r"min_score=.*: must be auto, none or a number"):
            index.search(vectors, 1, min_score=value)


def test_captions_have_no_minimum(tmp_path):
    index = make(tmp_path, captions=near(MOMENTS, 3))
    assert found(index, OTHERS, to="captions", min_score="auto") == 1


def test_it_follows_the_index(tmp_path):
    """Texts are embedded once; a run without changes writes nothing; dead vectors do not count."""
    model, bytes_of = Model(), (tmp_path / catalog.FILE).read_bytes
    index = make(tmp_path, model=model)
    first = index.calibration()
    before = bytes_of()
    make(tmp_path, np.empty((0, DIM), np.float32), model)
    assert bytes_of() == before
    shelf = Shelf(tmp_path, DIM, files=len(MOMENTS))
    ids = shelf.add(GENERAL)
    shelf.catalog.calibrate(model)
    assert index.calibration().middle == pytest.approx(1)
    shelf.remove(ids)
    shelf.catalog.calibrate(model)
    assert index.calibration().as_json() == first.as_json() and model.calls == 1
    shelf.remove(range(len(MOMENTS) - calibration.MOMENTS + 1))
    shelf.catalog.calibrate(model)
    shelf.close()
    assert index.calibration() is None and found(index, OTHERS, min_score="auto") == 1
