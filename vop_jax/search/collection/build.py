"""Builds an index on a server, or brings it up to date."""

import contextlib
from typing import Any

from vop_jax.errors import UserError
from vop_jax.inference.retriever import Retriever
from vop_jax.search.build import IndexRequest, plan_run
from vop_jax.search.collection import distributed, lease, vector_index
from vop_jax.search.collection.schema import FILES, Collections, file_id, indexed_file
from vop_jax.search.collection.writer import CollectionWriter
from vop_jax.search.updater import IndexOptions, IndexReport, Updater


def build_collection(
    request: IndexRequest,
    options: IndexOptions | None = None,
    retriever: Retriever | None = None,
    beam: Any = None,
) -> IndexReport:
    """Indexes videos into the collection `request.store`; safe to kill at any time.

    Other arguments and errors are those of `build.build_index`.

    Args:
        beam: Apache Beam's pipeline options; None: decodes and embeds on this machine.

    Raises:
        UserError: also if another run writes this index, or the server does not answer.
    """
    uri = request.store
    for given, flag in ((request.captions, "--captions"), (request.keep_frames, "--keep_frames")):
        if given:
            raise UserError(f"{flag}: needs --index=DIR; an index on a server holds moments only")
    with contextlib.closing(Collections(uri)) as collections:
        stored = collections.info() if collections.exist() else None
        rows = collections.rows(FILES, "", ["path", "size"]) if stored else ()
        indexed = {row["path"]: row["size"] for row in rows}
        plan = plan_run(f"store {uri}", stored, indexed, request, retriever)
        _check_numbers([file.path for file in plan.scan.files])
        collections.create(plan.info.dim, vector_index.parse(plan.info.vector_index))
        with lease.held(collections) as held:
            if collections.read("info") and collections.info().model != plan.info.model:
                raise UserError(f"store {uri}: another run has just made it with another model")
            files = map(indexed_file, collections.rows(FILES))
            writer = CollectionWriter(collections, plan.info, files, held.check)
            killed = writer.begin()
            if beam is None:
                options = options or IndexOptions()
                Updater(writer, plan.info, plan.retriever, options, plan.report).run(plan.scan)
            else:
                job = distributed.Job(uri, held.owner, plan.info, options or IndexOptions(1))
                distributed.run(job, writer, plan.scan, plan.report, beam)
            if killed:
                writer.sweep()
            writer.calibrate(plan.retriever)
            writer.end()
        return plan.report


def _check_numbers(paths: list[str]) -> None:
    """Raises UserError where two paths have the same number."""
    numbers: dict[int, str] = {}
    for path in paths:
        other = numbers.setdefault(file_id(path), path)
        if other != path:
            raise UserError(f"{path}: has the same number as {other}; rename one of them")
