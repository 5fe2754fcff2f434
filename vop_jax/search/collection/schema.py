"""The collections of an index on a Milvus server.

    NAME          a row a moment; a hit needs no other row
    NAME_files    a row a file; a file counts once its row is here
    NAME_about    texts: what the index was made with, its minimum of scores, its writer

All writes are upserts of whole rows under ids that follow from their content, so a run that is
repeated writes the same rows again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.catalog import IndexedFile, IndexInfo
from vop_jax.search.collection.vector_index import VectorIndex
from vop_jax.search.query import Filter
from vop_jax.search.stores import client
from vop_jax.search.stores.client import ANSWER, CONNECT, LISTED, LOAD, MOST, ROWS, milvus_errors

VERSION = 1  # of these collections
MOMENTS, FILES, ABOUT = "", "_files", "_about"  # endings of their names
PATH, ID, DIGEST, REASON = 4096, 64, 256, 1024  # longest texts, bytes
PART = 60_000  # characters of a text in one row of NAME_about; Milvus allows 65,535 bytes
EXACT = VectorIndex("FLAT", {}, {})
NO_VECTOR = [0.0, 0.0]  # Milvus wants one in each row

Row = dict[str, Any]
FIELDS: dict[str, dict[str, int | None]] = {  # the longest text, or None for a number
    MOMENTS: {"id": ID, "path": PATH, "file": None, "number": None, "mtime": None},
    FILES: {
        **{"path": PATH, "digest": DIGEST, "reason": REASON},
        **{"id": None, "size": None, "mtime": None, "moments": None},
    },
    ABOUT: {"key": ID, "value": 65_535},
}
SECONDS = {MOMENTS: ("start", "end"), FILES: ("end",), ABOUT: ()}
KEYS = {MOMENTS: "id", FILES: "id", ABOUT: "key"}


def file_id(path: str) -> int:
    """The number of a file: 53 bits of a hash of its path, which JavaScript can hold."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) >> 11


def moment_id(path: str, digest: str, number: int) -> str:
    """The key of a segment of a file with this content."""
    return f"{file_id(path):014x}-{digest[:16]}-{number}"


def indexed_file(row: Row) -> IndexedFile:
    """A row of NAME_files."""
    texts = row["digest"] or None, row["reason"] or None
    return IndexedFile(row["id"], row["path"], row["size"], row["mtime"], *texts)


def quote(text: str) -> str:
    """A text as an expression of Milvus has it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r") + '"'


def expression(filter: Filter) -> str:
    """A filter of files as an expression of Milvus."""
    conditions = []
    if filter.below is not None:
        first, last = map(quote, filter.paths)
        conditions += [f"path >= {first}", f"path < {last}"]
    conditions += [] if filter.since is None else [f"mtime >= {filter.since}"]
    conditions += [] if filter.until is None else [f"mtime < {filter.until}"]
    return " and ".join(conditions)


class Collections:
    """The collections of one index; threads may share them.

    Each method raises UserError where the server does not answer or refuses.
    """

    def __init__(self, uri: str, *, fresh: bool = True):
        """Connects to a server, without a request about the index.

        Args:
            fresh: waits a fifth of a second in each call to see all that was written before it;
                without it, what is read may be some seconds old.
        """
        self.uri = uri
        self._level = "Strong" if fresh else "Bounded"
        self._client = client.connect(uri, write=True)
        _, self._name = client.split(uri)

    def exist(self) -> bool:
        """Whether there is an index of this name; loads it.

        Raises:
            UserError: the name belongs to something else, or to an index of another version.
        """
        with milvus_errors(self.uri):
            names = set(self._client.list_collections(timeout=CONNECT))
        own = [self._name + ending for ending in FIELDS]
        if own[0] in names and own[-1] not in names:
            raise UserError(
                f"store {self.uri}: the collection {own[0]} is not an index of this program; "
                "give another #NAME"
            )
        if own[-1] not in names:
            return False
        self._load(own[-1])
        version = self.read("version")  # the last that `create` writes
        if version and version != str(VERSION):
            raise UserError(
                f"store {self.uri}: is of version {version}, and this program reads version "
                f"{VERSION}; index it again under another #NAME"
            )
        if not version:
            return False  # its first writer was killed early
        for name in own[:-1]:
            self._load(name)
        return True

    def _load(self, name: str) -> None:
        with milvus_errors(self.uri):
            self._client.load_collection(name, timeout=LOAD)

    def create(self, dim: int, vector_index: VectorIndex) -> None:
        """Makes the collections, for vectors [E] of `dim` numbers; completes a killed call."""
        for ending, texts in FIELDS.items():
            with milvus_errors(self.uri):
                if not self._client.has_collection(self._name + ending, timeout=CONNECT):
                    moments = ending == MOMENTS
                    width, kind = (dim, vector_index) if moments else (len(NO_VECTOR), EXACT)
                    self._create(ending, texts, width, kind)
            self._load(self._name + ending)
        self.write("version", str(VERSION))

    def _create(
        self, ending: str, fields: dict[str, int | None], dim: int, vector_index: VectorIndex
    ) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        for name, longest in fields.items():
            key = {"is_primary": True} if name == KEYS[ending] else {}
            if longest is None:
                schema.add_field(name, DataType.INT64, **key)
            else:
                schema.add_field(name, DataType.VARCHAR, max_length=longest, **key)
        for name in SECONDS[ending]:
            schema.add_field(name, DataType.DOUBLE)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        index = self._client.prepare_index_params()
        kind, params = vector_index.kind, vector_index.build
        index.add_index("vector", index_type=kind, metric_type="IP", params=params)
        self._client.create_collection(
            self._name + ending,
            schema=schema,
            index_params=index,
            consistency_level="Strong",
            timeout=ANSWER,
        )

    def info(self) -> IndexInfo:
        """What the index was made with; machines may know the server by other addresses."""
        return IndexInfo(**json.loads(self.read("info")) | {"store": self.uri})

    def read(self, key: str) -> str:
        """A text of NAME_about; "" if there is none."""
        rows = self.rows(ABOUT, f"key >= {quote(f'{key}/')} and key < {quote(f'{key}0')}")
        parts = {int(row["key"].rpartition("/")[2]): row["value"] for row in rows}
        if not parts:
            return ""
        count, _, first = parts[0].partition(":")
        return first + "".join(parts[i] for i in range(1, int(count)))

    def write(self, key: str, text: str) -> None:
        """Keeps a text, in one message of as many rows as it needs."""
        parts = [text[i : i + PART] for i in range(0, len(text), PART)] or [""]
        parts[0] = f"{len(parts)}:{parts[0]}"
        rows = [{"key": f"{key}/{i}", "value": part} for i, part in enumerate(parts)]
        self.upsert(ABOUT, [row | {"vector": NO_VECTOR} for row in rows])

    def rows(
        self, ending: str, filter: str = "", fields: Sequence[str] | None = None
    ) -> Iterator[Row]:
        """All rows that pass, in any order, with these fields or all but the vector."""
        if fields is None:
            fields = [*FIELDS[ending], *SECONDS[ending]]
        options = {
            **{"filter": filter, "output_fields": list(fields), "timeout": ANSWER},
            "consistency_level": self._level,
        }
        name = self._name + ending
        with milvus_errors(self.uri):
            few = self._client.query(name, limit=MOST, **options)
            if len(few) < MOST:
                yield from few
                return
            pages = self._client.query_iterator(name, batch_size=ROWS, **options)
            while page := pages.next():
                yield from page
            pages.close()

    def count(self, ending: str, filter: str = "") -> int:
        """The number of rows that pass."""
        with milvus_errors(self.uri):
            (row,) = self._client.query(
                self._name + ending,
                filter=filter,
                output_fields=["count(*)"],
                consistency_level=self._level,
                timeout=ANSWER,
            )
        return row["count(*)"]

    def nearest(
        self,
        vectors: np.ndarray,
        k: int,
        filter: str,
        fields: Sequence[str],
        vector_index: VectorIndex,
    ) -> list[list[Row]]:
        """The k nearest moments of each vector [N, E], best first, with "id" and "score"."""
        found: list[list[Row]] = []
        for start in range(0, len(vectors), ROWS):
            with milvus_errors(self.uri):
                lists = self._client.search(
                    self._name,
                    data=list(vectors[start : start + ROWS]),
                    limit=k,
                    filter=filter,
                    output_fields=list(fields),
                    search_params=vector_index.search_params(k),
                    consistency_level=self._level,
                    timeout=ANSWER,
                )
            found += [
                [{**hit["entity"], "id": hit["id"], "score": hit["distance"]} for hit in hits]
                for hits in lists
            ]
        return found

    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        """float32 [M, E] of moments."""
        found: dict[str, list[float]] = {}
        for start in range(0, len(ids), ROWS):
            part = f"id in {json.dumps(list(ids[start : start + ROWS]))}"
            found |= {
                row["id"]: row["vector"] for row in self.rows(MOMENTS, part, ["id", "vector"])
            }
        if missing := [number for number in ids if number not in found]:
            raise UserError(f"store {self.uri}: has no moment {missing[0]}")
        return np.array([found[number] for number in ids], np.float32)

    def upsert(self, ending: str, rows: Sequence[Row]) -> None:
        """Writes rows in place of those with the same keys."""
        for start in range(0, len(rows), ROWS):
            with milvus_errors(self.uri):
                part = list(rows[start : start + ROWS])
                self._client.upsert(self._name + ending, part, timeout=ANSWER)

    def delete(self, ending: str, ids: Sequence[Any]) -> None:
        """Removes rows by their keys."""
        for start in range(0, len(ids), LISTED):
            with milvus_errors(self.uri):
                part = list(ids[start : start + LISTED])
                self._client.delete(self._name + ending, ids=part, timeout=ANSWER)

    def close(self) -> None:
        self._client.close()
