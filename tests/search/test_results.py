"""Results as files: what other programs read in them."""

import csv
import io
import sys

import pytest

from tests.search import library
from vop_jax import UserError
from vop_jax.search import results
from vop_jax.search.query import Hit
from vop_jax.search.results import Result
from vop_jax.video.stream import frame_rates

QUERIES = "a dog", 'two cats, "asleep"\non a mat'


@pytest.fixture
def found(tmp_path):
    """Two moments of a film for one query; a film that is gone and a caption for another."""
    library.write_film(tmp_path / "a, b.mp4", 30)
    hits = [Hit(1, "a, b.mp4", 0.5, 0.0, 3.0), Hit(1, "a, b.mp4", 0.25, 1.04, 2.0)]
    others = [Hit(2, "gone \udcff.mp4", 0.4, 1.0, 2.0)]
    rows = [[results.hit_row(str(tmp_path), hit) for hit in each] for each in (hits, others)]
    return [Result(*pair) for pair in zip(QUERIES, rows, strict=True)]


def test_csv_has_a_row_for_each_hit(found, tmp_path):
    caption = Hit(0, "", 0.125, 0.0, float("inf"), "a mat")
    found = [*found, Result("none", []), Result("mat", [results.hit_row("", caption)])]
    rows = list(csv.DictReader(io.StringIO(results.as_csv(found), newline="")))
    film = str(tmp_path / "a, b.mp4")
    assert [row["query"] for row in rows] == [QUERIES[0], *QUERIES, "mat"]
    assert rows[1] == {
        **{"query": "a dog", "path": film, "score": "0.25", "start": "1.04", "end": "2.0"},
        **{"caption": "", "missing": "False"},
    }
    assert rows[2]["missing"] == "True"
    assert (rows[3]["caption"], rows[3]["path"], rows[3]["end"]) == ("a mat", "", "")


def test_a_timeline_has_a_track_for_each_query(found, tmp_path):
    otio = pytest.importorskip("opentimelineio", reason="needs the extra otio")
    text = results.as_text([*found, Result("none", [])], "otio", many=True)
    timeline = otio.adapters.read_from_string(text, "otio_json")
    assert [track.name for track in timeline.tracks] == [*QUERIES, "none"]
    assert [len(track) for track in timeline.tracks] == [2, 1, 0]
    whole, part = timeline.tracks[0]
    film = (tmp_path / "a, b.mp4").as_uri()
    assert whole.media_reference.target_url == part.media_reference.target_url == film
    time = otio.opentime.RationalTime
    assert whole.source_range == otio.opentime.TimeRange(time(0, 10), time(30, 10))
    assert part.source_range == otio.opentime.TimeRange(time(10, 10), time(10, 10))
    assert part.metadata["vop_jax"] == {"query": "a dog", "score": 0.25}
    (gone,) = timeline.tracks[1]
    assert gone.media_reference.target_url.endswith("/gone%20%FF.mp4")
    assert gone.source_range.duration == time(25, 25)


def test_a_timeline_needs_its_package(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentimelineio", None)
    with pytest.raises(UserError, match=r"a timeline: .*; pip install -e .\.\[otio\]"):
        results.as_text(found, "otio", many=False)


def test_the_rate_that_a_file_states(tmp_path):
    library.write_film(tmp_path / "a.mp4", 10)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    paths = [str(tmp_path / name) for name in ("a.mp4", "bad.mp4", "none.mp4")]
    assert frame_rates(paths) == dict(zip(paths, (10.0, 25.0, 25.0), strict=True))
