"""The collections of an index, and a connection to them.

    NAME         a row a moment, which has all that a hit says
    NAME_files   a row a file; a file without one is not indexed
    NAME_about   what the index was made with, and its minimum of scores

A moment's key is made of the path, the content and the number of its segment, so writing it again
changes nothing. Milvus has no transactions: a file's moments are written before its own row, which
commits them, and are removed after it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search import calibration
from vop_jax.search.calibration import Calibration
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.stores import milvus

VERSION = 1
MOMENTS, FILES, ABOUT = "", "_files", "_about"  # endings of the names of collections
FIELDS: dict[str, dict[str, type]] = {  # of each, with its key first; VARCHAR or INT64
    MOMENTS: {"id": str, "file": int, "path": str, "start": float, "end": float}
    | {"size": int, "mtime": int},
    FILES: {"path": str, "id": int, "size": int, "mtime": int, "digest": str, "end": float}
    | {"moments": int, "reason": str},
    ABOUT: {"key": str, "value": str},
}
TINY = [0.0, 0.0]  # Milvus wants a vector in each row, also in that of a file
LONGEST = 65_535  # bytes of a text: Milvus' own limit
PAGE = 4096  # rows of one message
LISTED = 1000  # keys in one expression
PARTITION = "_default"  # of all rows
GENERAL = "general/"  # keys of the vectors of the general captions, see `calibration`


def file_id(path: str) -> int:
    """A positive 63-bit number for a path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) >> 1 or 1


def moment_keys(path: str, digest: str, count: int) -> list[str]:
    """The keys of the segments of a file with this content."""
    return [f"{file_id(path):016x}-{digest[:8]}-{number}" for number in range(count)]


def literal(value: str | int | float) -> str:
    """A value in an expression of Milvus, which reads the escapes of JSON."""
    return json.dumps(value, ensure_ascii=False)


def among(field: str, values: Iterable[str | int]) -> Iterator[str]:
    """Expressions that name some rows each."""
    listed = list(values)
    for start in range(0, len(listed), LISTED):
        yield f"{field} in [{', '.join(map(literal, listed[start : start + LISTED]))}]"


class Collections:
    """A connection to the collections of one index.

    Each method takes the ending of a collection: `MOMENTS`, `FILES` or `ABOUT`; all of them raise
    UserError, in one line that names the store, where Milvus does not do what it is asked for.

    Attributes:
        uri: of the database and the collections, as `stores.milvus` has it.
    """

    def __init__(self, uri: str, *, write: bool = False):
        self.uri = uri
        self._name = uri.partition("#")[2] or milvus.COLLECTION
        self._client = milvus.connect(uri, write=write)

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def info(self) -> IndexInfo | None:
        """What the index was made with; None where there is none yet. Opens its collections.

        Raises:
            UserError: it is of another version, or these collections are of another program.
        """
        with milvus.milvus_errors(self.uri):
            exist = [
                self._client.has_collection(self._name + part, timeout=milvus.CONNECT)
                for part in FIELDS
            ]
            self._check_fields([part for part, there in zip(FIELDS, exist, strict=True) if there])
            if not all(exist):
                return None  # or its first writer was killed
            for part in FIELDS:
                self._client.load_collection(self._name + part, timeout=milvus.LOAD)
        text = self.about("info")
        if text is None:
            return None
        try:
            values = json.loads(text)
            if (version := values["version"]) == VERSION:
                return IndexInfo(**values)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"store {self.uri}: its description cannot be read") from None
        raise UserError(
            f"store {self.uri}: an index of version {version}, this program reads version "
            f"{VERSION}; give another #NAME at its end"
            + ", or use a newer program"
            * (version > VERSION)
        )

    def _check_fields(self, parts: list[str]) -> None:
        for part in parts:
            name = self._name + part
            fields = self._client.describe_collection(name, timeout=milvus.CONNECT)["fields"]
            if {field["name"] for field in fields} != {*FIELDS[part], "vector"}:
                raise UserError(
                    f"store {self.uri}: collection {name} is not of an index like this; give "
                    "another #NAME at its end, or the --index whose vectors it has"
                )

    def create(self, info: IndexInfo) -> None:
        """Creates what is missing, and stores what the index is made with."""
        from pymilvus import DataType

        types = {str: DataType.VARCHAR, int: DataType.INT64, float: DataType.DOUBLE}
        client = self._client
        for part, fields in FIELDS.items():
            with milvus.milvus_errors(self.uri):
                if client.has_collection(self._name + part, timeout=milvus.CONNECT):
                    continue
                schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
                for number, (name, kind) in enumerate(fields.items()):
                    length = {"max_length": LONGEST} if kind is str else {}
                    schema.add_field(name, types[kind], is_primary=number == 0, **length)
                dim = len(TINY) if part == FILES else info.dim
                schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
                client.create_collection(
                    self._name + part,
                    schema=schema,
                    index_params=milvus.vector_index(client),
                    consistency_level="Strong",
                    timeout=milvus.ANSWER,
                )
                client.load_collection(self._name + part, timeout=milvus.LOAD)
        values = dataclasses.asdict(info) | {"version": VERSION}
        self.set_about("info", json.dumps(values), info.dim)

    def about(self, key: str, **options: Any) -> str | None:
        """A text about the index."""
        rows = self.query(ABOUT, f"key == {literal(key)}", ["value"], **options)
        return rows[0]["value"] if rows else None

    def set_about(self, key: str, value: str, dim: int) -> None:
        """Replaces a text about the index."""
        self.upsert(ABOUT, [{"key": key, "value": value, "vector": [0.0] * dim}])

    def calibration(self, general: np.ndarray | None = None, **options: Any) -> Calibration | None:
        """The minimum of scores; `general` saves reading the vectors of general captions again."""
        text = self.about(calibration.KEY, **options)
        if text is None:
            return None
        if general is None:
            general = np.array([row["vector"] for row in self._general()], np.float32)
        return Calibration(general, **json.loads(text))

    def _general(self) -> Iterator[dict[str, Any]]:
        within = f"key >= {literal(GENERAL)} and key < {literal(GENERAL[:-1] + '0')}"
        return self.rows(ABOUT, ["vector"], within)

    def set_calibration(self, known: Calibration | None) -> None:
        """Replaces the minimum of scores."""
        if known is None:
            self.delete(ABOUT, [f"key == {literal(calibration.KEY)}"])
            return
        # The vectors first: they stay the same as long as the model does.
        self.upsert(
            ABOUT,
            [
                {"key": f"{GENERAL}{number:04d}", "value": "", "vector": vector}
                for number, vector in enumerate(known.general)
            ],
        )
        values = {name: value for name, value in vars(known).items() if name != "general"}
        self.set_about(calibration.KEY, json.dumps(values), known.general.shape[1])

    def query(
        self, part: str, expression: str, fields: Sequence[str], **options: Any
    ) -> list[dict[str, Any]]:
        """The rows of an expression; with a `limit`, the first of them by their keys."""
        with milvus.milvus_errors(self.uri):
            return self._client.query(
                self._name + part,
                filter=expression,
                output_fields=list(fields),
                partition_names=[PARTITION],
                timeout=milvus.ANSWER,
                **options,
            )

    def rows(
        self, part: str, fields: Sequence[str], expression: str = ""
    ) -> Iterator[dict[str, Any]]:
        """All rows of an expression, in the order of their keys."""
        key = next(iter(FIELDS[part]))
        also = f" and ({expression})" if expression else ""
        last = ""
        while True:
            page = self.query(part, f"{key} > {literal(last)}{also}", [*{key, *fields}], limit=PAGE)
            yield from page
            if len(page) < PAGE:
                return
            last = page[-1][key]

    def count(self, part: str, expression: str = "", **options: Any) -> int:
        """The number of rows."""
        return self.query(part, expression, ["count(*)"], **options)[0]["count(*)"]

    def upsert(self, part: str, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows in place of those with the same keys; each message is atomic."""
        for start in range(0, len(rows), PAGE):
            with milvus.milvus_errors(self.uri):
                self._client.upsert(
                    self._name + part,
                    list(rows[start : start + PAGE]),
                    partition_name=PARTITION,
                    timeout=milvus.ANSWER,
                )

    def delete(self, part: str, expressions: Iterable[str]) -> None:
        """Removes the rows of each expression."""
        for expression in expressions:
            with milvus.milvus_errors(self.uri):
                self._client.delete(
                    self._name + part,
                    filter=expression,
                    partition_name=PARTITION,
                    timeout=milvus.ANSWER,
                )

    def search(
        self, vectors: np.ndarray, k: int, fields: Sequence[str], expression: str = ""
    ) -> list[list[tuple[float, dict[str, Any]]]]:
        """(score, fields) of the k moments nearest to each of [N, E]; k at most `milvus.MOST`."""
        with milvus.milvus_errors(self.uri):
            found = self._client.search(
                self._name,
                data=list(vectors),
                limit=k,
                filter=expression,
                output_fields=list(fields),
                search_params={"metric_type": "IP"},
                partition_names=[PARTITION],
                timeout=milvus.ANSWER,
            )
        return [[(hit["distance"], hit["entity"]) for hit in hits] for hits in found]

    def vectors(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """{key: float32 [E]} of moments; without those that are gone."""
        found: dict[str, np.ndarray] = {}
        for expression in among("id", dict.fromkeys(keys)):
            for row in self.query(MOMENTS, expression, ["id", "vector"]):
                found[row["id"]] = np.array(row["vector"], np.float32)
        return found
