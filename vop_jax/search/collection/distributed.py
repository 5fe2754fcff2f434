"""Indexes on workers of Apache Beam: each does with a shard of files what one machine does."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vop_jax.errors import UserError
from vop_jax.inference import retriever as retrievers
from vop_jax.inference.retriever import Retriever
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.collection import lease
from vop_jax.search.collection.schema import FILES, Collections, indexed_file
from vop_jax.search.collection.writer import CollectionWriter
from vop_jax.search.scan import Scan, VideoFile
from vop_jax.search.searcher import check_model
from vop_jax.search.updater import IndexOptions, IndexReport, Updater, compare

SHARD = 128  # most files that a worker takes at once; it starts decoding processes for each shard
SHARDS = 16  # at least so many, where there are as many files, so that all workers have some
GONE = 10_000  # files that are gone, among which workers look for those that have moved
LOOK = 5.0  # seconds between looks at the progress


@dataclasses.dataclass(frozen=True)
class Job:
    """What all workers of a run go by.

    Attributes:
        uri: of the collections.
        owner: of the lease.
        info: what the index is made with; workers read its CLIP and prompts from the same paths.
        gone: rows of files that do not exist any more, and may have moved.
    """

    uri: str
    owner: str
    info: IndexInfo
    options: IndexOptions
    gone: Sequence[IndexedFile] = ()


@dataclasses.dataclass(frozen=True)
class Shard:
    """Files that a worker indexes.

    Attributes:
        known: their rows in the index.
    """

    files: list[VideoFile]
    known: list[IndexedFile]


def run(
    job: Job, writer: CollectionWriter, scan: Scan, report: IndexReport, beam_options: Any
) -> None:
    """Makes the index hold the files of a scan, and no others."""
    import apache_beam as beam

    before = writer.files()
    new, gone = compare(before, scan, job.options.retry)
    report.unchanged = len(scan.files) - len(new)
    if new:
        job = dataclasses.replace(job, gone=[before[path] for path in sorted(gone)[:GONE]])
        progress = _progress(job.uri, len(new))
        with progress, _beam_errors(), beam.Pipeline(options=beam_options) as pipeline:
            _ = (
                pipeline
                | beam.Create(list(_shards(new, before)))
                | beam.Reshuffle()
                | beam.Map(index_shard, job)
            )
    with writer.transaction():
        writer.remove(gone)
    _complete(report, job, new, before, gone)


@contextlib.contextmanager
def _beam_errors() -> Iterator[None]:
    """Turns a failed pipeline, whose text has the traceback of a worker, into one line."""
    try:
        yield
    except Exception as error:  # each runner has errors of its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        own = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
        reason = (own or lines)[-1].strip()
        raise UserError(f"--beam_options: a worker failed: {reason}") from error


def _shards(new: Sequence[VideoFile], before: Mapping[str, IndexedFile]) -> Iterator[Shard]:
    size = max(1, min(SHARD, len(new) // SHARDS))
    for start in range(0, len(new), size):
        files = list(new[start : start + size])
        yield Shard(files, [before[file.path] for file in files if file.path in before])


def index_shard(shard: Shard, job: Job) -> None:
    """What a worker does; a repetition writes the same rows again."""
    collections = _collections(job.uri)
    lease.check_owner(collections, job.owner)
    writer = CollectionWriter(collections, job.info, [*shard.known, *job.gone])
    report = IndexReport()  # the driver counts rows instead
    updater = Updater(writer, job.info, _retriever(job.info), job.options, report, progress=False)
    updater.index(shard.files, [file.path for file in job.gone])


@functools.cache
def _collections(uri: str) -> Collections:
    """A connection that the shards of a process share."""
    return Collections(uri)


@functools.cache
def _retriever(info: IndexInfo) -> Retriever:
    """The model that the shards of a process share."""
    retriever = retrievers.load(
        info.clip, info.prompts or None, frames=info.frames, dtype=info.dtype
    )
    check_model(info.store, info, retriever)
    return retriever


def _complete(
    report: IndexReport,
    job: Job,
    new: Sequence[VideoFile],
    before: Mapping[str, IndexedFile],
    gone: set[str],
) -> None:
    """Fills the report from the rows of the files."""
    after = {row["path"]: indexed_file(row) for row in _collections(job.uri).rows(FILES)}
    old = {before[path].digest for path in gone}
    for file in new:
        row = after.get(file.path)
        if row is None or (row.size, row.mtime) != (file.size, file.mtime):
            report.skipped[file.path] = "it disappeared, or changes while it is read"
        elif row.reason is not None:
            report.failed += 1
        elif file.path in before:
            report.changed += 1
        elif row.digest in old:
            report.moved += 1
        else:
            report.added += 1
    report.removed = len(gone) - report.moved


@contextlib.contextmanager
def _progress(uri: str, total: int) -> Iterator[None]:
    """A bar of the files that workers have added, counted on the server."""
    ended = threading.Event()
    with (
        contextlib.closing(Collections(uri, fresh=False)) as collections,
        tqdm(desc=f"{total} files", total=total, unit="file") as bar,
    ):
        first = collections.count(FILES)

        def look() -> None:
            while not ended.wait(LOOK):
                with contextlib.suppress(UserError):  # workers report a server that is down
                    bar.update(collections.count(FILES) - first - bar.n)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
