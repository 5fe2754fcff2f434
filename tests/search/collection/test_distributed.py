"""Workers of Apache Beam write what one machine writes."""

import shutil
import uuid

import pytest

from tests.search import library
from tests.search.collection.test_collection import rows
from vop_jax import UserError, cli
from vop_jax.search.build import IndexRequest
from vop_jax.search.collection.build import build_collection
from vop_jax.search.updater import IndexOptions

pytest.importorskip("apache_beam", reason="needs the extra beam")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Beam's own
]
TWO_PROCESSES = (
    "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"
)


def test_workers_write_what_one_machine_writes(milvus, tmp_path, retriever, clip):
    uri, films = f"{milvus}#d{uuid.uuid4().hex[:12]}", tmp_path / "films"
    library.write_films(films, 6)
    beam = cli.beam_options(TWO_PROCESSES)
    request = IndexRequest(str(films), clip=str(clip), store=uri, window=1.0)
    options = IndexOptions(workers=1)
    report = build_collection(request, options, retriever, beam)
    assert (report.added, report.failed, report.skipped) == (6, 0, {})
    (films / "c.mp4").rename(films / "moved.mp4")
    (films / "e.mp4").unlink()
    (films / "junk.mp4").write_bytes(b"junk")
    shutil.copy(films / "a.mp4", films / "sub" / "b.mp4")
    report = build_collection(request, options, retriever, beam)
    numbers = (report.moved, report.removed, report.failed, report.changed, report.unchanged)
    assert numbers == (1, 1, 1, 1, 3)
    library.make(None, films, retriever, store=f"{uri}one", window=1.0, clip=str(clip))
    assert rows(uri) == rows(f"{uri}one")

    films.joinpath("new.mp4").write_bytes(b"x")
    gone = IndexRequest(str(films), clip=str(tmp_path / "gone.safetensors"), store=uri)
    with pytest.raises(UserError, match=r"a worker failed: .*gone\.safetensors: no such file"):
        build_collection(gone, options, retriever, beam)
