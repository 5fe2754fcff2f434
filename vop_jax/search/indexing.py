"""Files are decoded, embedded and stored, all at the same time."""

import collections
import contextlib
import dataclasses
import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from vop_jax.retriever import Retriever
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.decoding import Decoder, Work
from vop_jax.search.files import Found
from vop_jax.search.store import VectorStore
from vop_jax.search.writing import Catalog, File

AHEAD = 2  # batches that wait for the devices


@dataclasses.dataclass(frozen=True)
class Making:
    """How an index is made; what it holds does not depend on it.

    Attributes:
        workers: decoding processes; 0: one a core.
        batch: clips that are embedded, and then stored, at once.
        seconds: that a file, or a part of a long one, may take to decode.
        retry: also try files again that could not be read and have not changed.
    """

    workers: int = 0
    batch: int = 16
    seconds: float = 300.0
    retry: bool = False


@dataclasses.dataclass
class Done:
    """What became of a folder's files: how many of each."""

    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: int = 0
    captions: int = 0
    cut: int = 0


class Update:
    """One run over the files of a folder."""

    def __init__(
        self, catalog: Catalog, store: VectorStore, retriever: Retriever, making: Making, done: Done
    ):
        self._catalog, self._store, self._retriever = catalog, store, retriever
        self._making, self._done = making, done
        self._known: dict[str, File] = {}
        self._gone: set[str] = set()
        self._batch: list[tuple[Work, int, np.ndarray]] = []
        self._settled: list[Work] = []  # to be written
        self._embedding: collections.deque[tuple[Future, list[tuple[Work, int]]]]
        self._embedding = collections.deque()

    def run(self, info: IndexInfo, files: list[Found]) -> None:
        """Has the index hold these files, as they are now, and no other.

        Args:
            info: what it is made with.
        """
        self._folder = info.folder
        self._known = self._catalog.files()
        self._gone = self._known.keys() - {file.path for file in files}
        todo = [file for file in files if self._is_new(file)]
        self._done.unchanged = len(files) - len(todo)
        decoder = Decoder(
            info.folder,
            self._retriever.reading,
            info.window,
            info.stride,
            self._making.workers or os.cpu_count() or 1,
            self._making.seconds,
        )
        if todo:
            self._make(decoder, todo)
        with self._catalog.transaction():
            old = self._catalog.moments_at(self._gone)
            self._catalog.remove(self._gone)
        self._done.removed = len(self._gone)
        self._store.delete(old)

    def _is_new(self, file: Found) -> bool:
        known = self._known.get(file.path)
        if known is None or (known.size, known.mtime) != (file.size, file.mtime):
            return True
        return known.reason is not None and self._making.retry

    def _make(self, decoder: Decoder, todo: list[Found]) -> None:
        """Decodes, embeds and stores, all at the same time."""
        total = sum(file.size for file in todo)
        bar = tqdm(
            desc=f"{len(todo)} files", total=total, unit="B", unit_scale=True, mininterval=0.5
        )
        with contextlib.ExitStack() as stack:
            self._bar = stack.enter_context(bar)
            self._device = stack.enter_context(ThreadPoolExecutor(1, "embed"))
            decoded = decoder.decode(todo, self._is_to_be_decoded)
            stack.enter_context(contextlib.closing(decoded))
            for work, clips in decoded:
                self._batch += [(work, number, pixels) for number, pixels in clips]
                if work.finished:
                    self._settled.append(work)
                while len(self._batch) >= self._making.batch:
                    self._embed()
                self._store_embedded(AHEAD)
            while self._batch:
                self._embed()
            self._store_embedded(0)

    def _is_to_be_decoded(self, work: Work) -> bool:
        """Whether no file of this content is in the index; if one is, its vectors serve."""
        assert work.digest is not None
        found = work.found
        twins = self._catalog.twins(work.digest)
        if not twins:
            return True
        own = next((twin for twin in twins if twin.path == found.path), None)
        moved = own or next((twin for twin in twins if twin.path in self._gone), None)
        if moved:
            with self._catalog.transaction():
                old = self._catalog.moments_at([found.path] if moved is not own else [])
                self._catalog.move(moved, found.path, found.size, found.mtime)
            self._store.delete(old)
            self._gone.discard(moved.path)
            self._done.moved += moved is not own
            self._done.unchanged += moved is own
            self._bar.update(found.size)
            return False
        moments = self._catalog.moments(twins[0])
        vectors = self._store.get(np.array([number for number, _ in moments], np.int64))
        work.spans, work.vectors = [span for _, span in moments], list(vectors)
        self._write([work])
        return False

    def _embed(self) -> None:
        """Sends a batch to the devices."""
        size = self._making.batch
        batch, self._batch = self._batch[:size], self._batch[size:]
        pixels = np.stack([clip for _, _, clip in batch])
        future = self._device.submit(self._retriever.embed_frames, pixels)
        self._embedding.append((future, [(work, number) for work, number, _ in batch]))

    def _store_embedded(self, left: int) -> None:
        """Writes files that are finished; waits while more than `left` batches are under way."""
        while self._embedding and (len(self._embedding) > left or self._embedding[0][0].done()):
            future, rows = self._embedding.popleft()
            for (work, number), vector in zip(rows, future.result(), strict=True):
                work.vectors[number] = vector
                work.unembedded -= 1
                if work.finished:
                    self._settled.append(work)
        if self._settled:
            settled, self._settled = self._settled, []
            self._write(settled)

    def _write(self, files: list[Work]) -> None:
        """The vectors, then the catalog: what it does not know of is not there."""
        ids: list[int] = []
        vectors: list[np.ndarray] = []
        with self._catalog.transaction():
            old = self._catalog.moments_at([work.found.path for work in files])
            for work in files:
                found = work.found
                state = (found.path, found.size, found.mtime)
                if work.reason:
                    if os.path.lexists(os.path.join(self._folder, found.path)):  # else it went away
                        self._catalog.add_unreadable(*state, work.reason)
                        self._done.failed += 1
                    continue
                embedded = [
                    (span, vector)
                    for span, vector in zip(work.spans, work.vectors, strict=True)
                    if vector is not None
                ]
                ids += self._catalog.add(*state, work.digest, [span for span, _ in embedded])
                vectors += [vector for _, vector in embedded]
                if found.path in self._known:
                    self._done.changed += 1
                else:
                    self._done.added += 1
            if ids:
                self._store.put(np.array(ids, np.int64), np.stack(vectors))
        self._store.delete(old)
        self._bar.update(sum(work.found.size for work in files))
