"""Brings the catalog of an index up to date: decodes, embeds and commits at the same time."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from vop_jax.data.datasets.folder import read_folder
from vop_jax.errors import UserError, VideoError
from vop_jax.inference.retriever import Retriever
from vop_jax.search import decoder, sources
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.scan import Scan, VideoFile
from vop_jax.search.writer import Caption, CatalogWriter, Frames
from vop_jax.storage import remote
from vop_jax.storage.files import is_remote
from vop_jax.video.moments import DecodeTask, Segment
from vop_jax.video.shots import ShotTask
from vop_jax.video.workers import in_processes

if TYPE_CHECKING:
    from vop_jax.search.collection.writer import CollectionWriter

AHEAD = 2  # batches that wait for the devices
CAPTIONS = 256  # embedded and committed at once


@dataclasses.dataclass(frozen=True)
class IndexOptions:
    """How to build an index; its content does not depend on them.

    Attributes:
        workers: decoding processes; 0: one a core.
        batch: clips embedded, and then committed, at once.
        seconds: limit to decode one file, or one part of a long file.
        retry: also read unchanged files again that could not be read before.
    """

    workers: int = 0
    batch: int = 16
    seconds: float = 300.0
    retry: bool = False


@dataclasses.dataclass
class IndexReport:
    """What a run did: numbers of files, and of new captions.

    Attributes:
        truncated: new captions that are longer than the model reads.
        skipped: {path: reason} of files that disappeared or changed while they were read; their
            indexed moments stay.
        unlisted: {folder: reason} of folders that cannot be listed; the moments of their files
            stay.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: int = 0
    captions: int = 0
    truncated: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    unlisted: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PendingFile:
    """A file that is being decoded and embedded.

    Attributes:
        file: in the state of its digest.
        digest: of its content.
        segments: its whole clip, then its moments.
        vectors: {number of the segment: float32 [E]}; a segment without frames has none.
        frames: {number of the segment: float32 [F, E]}, if they are kept.
        seconds: {number of the segment: of its F frames}.
        decoded: number of segments that are decoded.
        missing: number of tasks that are not decoded yet, and of their segments that are not
            embedded yet.
        failed: whether a part of it cannot be decoded.
    """

    file: VideoFile
    digest: str
    segments: list[Segment]
    vectors: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    frames: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    seconds: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    decoded: int = 0
    missing: int = 0
    failed: bool = False


def compare(
    indexed: Mapping[str, IndexedFile], scan: Scan, retry: bool
) -> tuple[list[VideoFile], set[str]]:
    """(files of a scan that are new or have changed, paths of indexed files that are gone).

    Args:
        retry: unreadable files are new, too.
    """
    gone = indexed.keys() - {file.path for file in scan.files}
    new = []
    for file in scan.files:
        row = indexed.get(file.path)
        again = retry and row is not None and row.reason is not None
        if again or row is None or (row.size, row.mtime) != (file.size, file.mtime):
            new.append(file)
    return new, {path for path in gone if scan.is_gone(path)}


class Updater:
    """One run over the files of a folder."""

    def __init__(
        self,
        catalog: "CatalogWriter | CollectionWriter",
        info: IndexInfo,
        retriever: Retriever,
        options: IndexOptions,
        report: IndexReport,
        *,
        progress: bool = True,
    ):
        self._catalog, self._info, self._retriever = catalog, info, retriever
        self._options, self._report, self._progress = options, report, progress
        self._indexed = catalog.files()
        self._gone: set[str] = set()
        self._clips: list[tuple[PendingFile, int, np.ndarray]] = []
        self._batches: collections.deque[tuple[Future, list[tuple[PendingFile, int]]]]
        self._batches = collections.deque()
        self._finished: list[PendingFile] = []

    def run(self, scan: Scan) -> None:
        """Makes the index hold the files of a scan, and no others."""
        new, gone = compare(self._indexed, scan, self._options.retry)
        self._report.unchanged = len(scan.files) - len(new)
        left = self.index(new, gone)
        if left:
            with self._catalog.transaction():
                self._catalog.remove(left)
        self._report.removed = len(left)

    def index(self, files: list[VideoFile], gone: Iterable[str]) -> set[str]:
        """Adds files; returns those of `gone`, paths that do not exist any more, that stay so.

        The others have moved to one of the files.
        """
        self._gone = set(gone)
        if files:
            self._index(files)
        return self._gone

    def _index(self, files: list[VideoFile]) -> None:
        total = sum(file.size for file in files)
        with (
            tqdm(
                desc=f"{len(files)} files",
                total=total,
                unit="B",
                unit_scale=True,
                disable=not self._progress,
            ) as self._bar,
            ThreadPoolExecutor(1, "embed") as self._device,
            contextlib.closing(self._decode(files)) as clips,
        ):
            for clip in clips:
                self._clips.append(clip)
                if len(self._clips) == self._options.batch:
                    self._embed()
                self._commit(AHEAD)
            self._embed()
            self._commit(0)

    def _decode(
        self, files: list[VideoFile]
    ) -> Generator[tuple[PendingFile, int, np.ndarray], None, None]:
        """(file, number of the segment, uint8 [F, S, S, 3]) of all segments, in their order."""
        options, info = self._options, self._info
        queue: collections.deque[PendingFile] = collections.deque()  # of the tasks under way
        paths = (sources.locate(info.folder, file.path) for file in files)
        plan = functools.partial(
            decoder.plan_file,
            spec=self._retriever.frame_spec,
            window=info.window,
            stride=info.stride,
            shots=info.shots,
        )
        workers = options.workers or os.cpu_count() or 1
        with contextlib.ExitStack() as stack:

            def pool(call, tasks, workers) -> Iterator:
                results = in_processes(call, tasks, workers, seconds=options.seconds)
                return stack.enter_context(contextlib.closing(results))

            # Planning reads and decoding computes: one process plans for several that decode.
            plans = zip(files, pool(plan, paths, 1 + workers // 4), strict=True)
            for result in pool(decoder.decode_job, self._jobs(plans, queue), workers):
                pending = queue.popleft()
                if isinstance(result, VideoError):
                    if not pending.failed:
                        self._fail(pending.file, result)
                    pending.failed = True
                    continue
                pending.segments += result.shots
                pending.missing += len(result.rows)
                for number, row in enumerate(result.rows, pending.decoded):
                    if row is None:
                        self._count_down(pending)
                    else:
                        pending.seconds[number] = [result.times[i] for i in row]
                        yield pending, number, result.pixels[row]
                pending.decoded += len(result.rows)
                self._count_down(pending)

    def _jobs(
        self,
        plans: Iterable[tuple[VideoFile, decoder.FilePlan | VideoError]],
        queue: collections.deque[PendingFile],
    ) -> Iterator[tuple[DecodeTask | ShotTask, decoder.State]]:
        """Decoding tasks of the files whose content is not in the index."""
        for file, plan in plans:
            if isinstance(plan, VideoError):
                self._fail(file, plan)
                continue
            file = VideoFile(file.path, *plan.state[:2])
            if self._reuse(file, plan.digest):
                continue
            pending = PendingFile(file, plan.digest, plan.segments, missing=len(plan.tasks))
            for task in plan.tasks:
                queue.append(pending)
                yield task, plan.state

    def _reuse(self, file: VideoFile, digest: str) -> bool:
        """Gives a file the vectors of an indexed one with the same content, if there is one."""
        twins = self._catalog.twins(digest)
        if not twins:
            return False
        own = next((twin for twin in twins if twin.path == file.path), None)
        moved = own or next((twin for twin in twins if twin.path in self._gone), None)
        if moved is None:
            segments, vectors = self._catalog.embedded(twins[0])
            copy = PendingFile(file, digest, segments, dict(enumerate(vectors)))
            if self._info.keep_frames:
                frames, seconds = self._catalog.embedded_frames(twins[0])
                copy.frames, copy.seconds = dict(enumerate(frames)), dict(enumerate(seconds))
            self._add([copy])
            return True
        with self._catalog.transaction():
            self._catalog.move(moved, file)
        self._gone.discard(moved.path)
        self._report.moved += moved is not own
        self._report.unchanged += moved is own
        self._bar.update(file.size)
        return True

    def _embed(self) -> None:
        """Sends the decoded clips to the devices."""
        clips, self._clips = self._clips, []
        if clips:
            pixels = np.stack([pixels for _, _, pixels in clips])
            future = self._device.submit(self._embed_clips, pixels)
            self._batches.append((future, [clip[:2] for clip in clips]))

    def _embed_clips(self, pixels: np.ndarray) -> tuple[np.ndarray, Iterable[np.ndarray | None]]:
        """uint8 [B, F, S, S, 3] -> float32 [B, E], and [B, F, E] if frames are kept."""
        if not self._info.keep_frames:
            return self._retriever.embed_frames(pixels), [None] * len(pixels)
        frames = self._retriever.embed_each_frame(pixels)
        mean = frames.mean(axis=1)  # as the model makes the vector of a video
        return mean / np.linalg.norm(mean, axis=1, keepdims=True), frames

    def _commit(self, ahead: int) -> None:
        """Commits finished files; waits while more than `ahead` batches are under way."""
        while self._batches and (len(self._batches) > ahead or self._batches[0][0].done()):
            future, clips = self._batches.popleft()
            for (pending, number), vector, frames in zip(clips, *future.result(), strict=True):
                pending.vectors[number] = vector
                if frames is not None:
                    pending.frames[number] = frames
                self._count_down(pending)
        if self._finished:
            finished, self._finished = self._finished, []
            self._add(finished)

    def _count_down(self, pending: PendingFile) -> None:
        pending.missing -= 1
        if not pending.missing:
            self._finished.append(pending)

    def _add(self, files: list[PendingFile]) -> None:
        rows, frames = [], list[Frames]()
        for pending in files:
            numbers = sorted(pending.vectors)
            segments = [pending.segments[number] for number in numbers]
            vectors = np.stack([pending.vectors[number] for number in numbers])
            rows.append((pending.file, pending.digest, segments, vectors))
            if self._info.keep_frames:
                each = [pending.frames[number] for number in numbers]
                seconds = [pending.seconds[number] for number in numbers]
                frames.append((np.stack(each), np.array(seconds)))
        with self._catalog.transaction():
            self._catalog.add_files(rows, frames)
        changed = sum(pending.file.path in self._indexed for pending in files)
        self._report.changed += changed
        self._report.added += len(files) - changed
        self._bar.update(sum(pending.file.size for pending in files))

    def _fail(self, file: VideoFile, error: VideoError) -> None:
        """Records a file as unreadable; skips it if the file itself is not the cause."""
        path = sources.locate(self._info.folder, file.path)
        new = file.path not in self._indexed
        try:
            if is_remote(path):
                remote.describe(path)
            else:
                with open(path, "rb") as content:
                    content.read(1)
            present = not isinstance(error, decoder.FileChanged)
        except (OSError, UserError):  # an indexed file was readable: its drive is the cause
            present = new and os.path.lexists(path)
        if present:
            with self._catalog.transaction():
                self._catalog.add_unreadable(file, str(error))
            self._report.failed += 1
        else:
            self._report.skipped[file.path] = str(error)
        self._bar.update(file.size)


def read_captions(path: str, folder: str) -> list[Caption]:
    """The captions of a file, each once.

    Args:
        path: CSV or JSON Lines as for training (see `read_folder`), or `.txt` with one a line.
        folder: of the videos that it names.

    Raises:
        UserError: it has another form, or no captions.
    """
    rows: list[Caption] = []
    if path.lower().endswith(".txt"):
        try:
            with open(path, encoding="utf-8-sig") as file:
                rows = [(line.strip(), "", 0.0, 0.0) for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.reason if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UserError(f"{path}: not readable as text ({reason})") from None
    else:
        for clips in read_folder(path, folder).values():
            for clip in clips:
                video = os.path.relpath(clip.path, folder).replace(os.sep, "/")
                end = math.inf if clip.end is None else clip.end
                rows += [(text, video, clip.start or 0.0, end) for text in clip.captions]
    if not rows:
        raise UserError(f"{path}: no captions in it")
    return list(dict.fromkeys(rows))


def update_captions(
    rows: list[Caption], catalog: CatalogWriter, retriever: Retriever, report: IndexReport
) -> None:
    """Makes an index hold these captions, and no others."""
    indexed, listed = catalog.captions(), set(rows)
    new = [row for row in rows if row not in indexed]
    for first in tqdm(range(0, len(new), CAPTIONS), "captions", disable=not new):
        part = new[first : first + CAPTIONS]
        vectors = retriever.embed_text([row[0] for row in part])
        with catalog.transaction():
            catalog.add_captions(part, vectors)
    with catalog.transaction():
        catalog.remove_captions(number for row, number in indexed.items() if row not in listed)
    report.captions = len(new)
    report.truncated = retriever.count_truncated([row[0] for row in new]) if new else 0
