"""Files are decoded, embedded and stored, all at the same time."""

import collections
import contextlib
import dataclasses
import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from vop_jax.inference.retriever import Retriever
from vop_jax.search.catalog import Catalog, IndexedFile, IndexInfo
from vop_jax.search.decoder import Decoder, Work
from vop_jax.search.scan import Found, Scan
from vop_jax.video.moments import Segment

AHEAD = 2  # batches that wait for the devices
ATTEMPTS = 3  # to read a file that changes meanwhile


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
    """What became of a folder's files: how many of each.

    Attributes:
        skipped: {path: reason} of files that went away or changed while they were read; what the
            index has of them stays.
        unlisted: {folder: reason}; what the index has of the files in it stays.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: int = 0
    captions: int = 0
    cut: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    unlisted: dict[str, str] = dataclasses.field(default_factory=dict)


class Update:
    """One run over the files of a folder."""

    def __init__(self, catalog: Catalog, retriever: Retriever, making: Making, done: Done):
        self._catalog, self._retriever = catalog, retriever
        self._making, self._done = making, done
        self._known: dict[str, IndexedFile] = {}
        self._gone: set[str] = set()
        self._batch: list[tuple[Work, int, np.ndarray]] = []
        self._settled: list[Work] = []  # to be written
        self._changed: list[Found] = []  # to be read again
        self._embedding: collections.deque[tuple[Future, list[tuple[Work, int]]]]
        self._embedding = collections.deque()

    def run(self, info: IndexInfo, scan: Scan) -> None:
        """Has the index hold these files, as they are now, and no other.

        Args:
            info: what it is made with.
        """
        self._folder = info.folder
        self._known = self._catalog.files()
        gone = self._known.keys() - {file.path for file in scan.files}
        self._gone = {path for path in gone if scan.is_gone(path)}
        todo = [file for file in scan.files if self._is_new(file)]
        self._done.unchanged = len(scan.files) - len(todo)
        decoder = Decoder(
            info.folder,
            self._retriever.frame_spec,
            info.window,
            info.stride,
            self._making.workers or os.cpu_count() or 1,
            self._making.seconds,
        )
        for _ in range(ATTEMPTS):
            if todo:
                self._make(decoder, todo)
            todo, self._changed = self._changed, []
        self._done.skipped |= {file.path: "it changes while it is read" for file in todo}
        if self._gone:
            with self._catalog.transaction():
                self._catalog.remove(self._gone)
        self._done.removed = len(self._gone)

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
        found = work.found
        twins = self._catalog.twins(work.digest)
        if not twins:
            return True
        own = next((twin for twin in twins if twin.path == found.path), None)
        moved = own or next((twin for twin in twins if twin.path in self._gone), None)
        if moved:
            with self._catalog.transaction():
                self._catalog.move(moved, found.path, found.size, found.mtime)
            self._gone.discard(moved.path)
            self._done.moved += moved is not own
            self._done.unchanged += moved is own
            self._bar.update(found.size)
            return False
        moments = self._catalog.moments(twins[0])
        work.spans = [span for _, span in moments]
        work.vectors = list(self._catalog.vectors([number for number, _ in moments]))
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
        """Commits files with their vectors."""
        embedded: list[tuple[Work, list[Segment]]] = []
        vectors: list[np.ndarray] = []
        unreadable = []
        for work in files:
            if work.changed:
                self._changed.append(work.found)
            elif not work.reason:
                spans = zip(work.spans, work.vectors, strict=True)
                embedded.append((work, [span for span, vector in spans if vector is not None]))
                vectors += [vector for vector in work.vectors if vector is not None]
            elif self._is_there(work.found.path):
                unreadable.append(work)
            else:
                self._done.skipped[work.found.path] = work.reason
        with self._catalog.transaction():
            ids = self._catalog.store_vectors("moments", np.stack(vectors)) if vectors else []
            for work, own_spans in embedded:
                found, own, ids = work.found, ids[: len(own_spans)], ids[len(own_spans) :]
                self._catalog.add(found.path, found.size, found.mtime, work.digest, own_spans, own)
            for work in unreadable:
                found = work.found
                self._catalog.add_unreadable(found.path, found.size, found.mtime, work.reason)
        self._done.failed += len(unreadable)
        changed = sum(work.found.path in self._known for work, _ in embedded)
        self._done.changed += changed
        self._done.added += len(embedded) - changed
        self._bar.update(sum(work.found.size for work in files if not work.changed))

    def _is_there(self, path: str) -> bool:
        """Whether a file is to blame that it cannot be read, not its drive; a new one always."""
        whole = os.path.join(self._folder, path)
        if path not in self._known and os.path.lexists(whole):
            return True
        try:
            with open(whole, "rb") as file:
                file.read(1)
        except OSError:
            return False
        return True
