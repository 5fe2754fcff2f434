"""Vectors in Milvus: in a local folder by Milvus Lite, or on a server that others share.

The index is FLAT and the metric IP, so searches are exact; among equal scores at the last place
Milvus chooses.
"""

import sqlite3
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.stores import client
from vop_jax.search.stores.base import NO_ID, Snapshot, VectorStore, distinct, named_ids
from vop_jax.search.stores.client import ANSWER, CONNECT, LISTED, LOAD, MOST, ROWS


class MilvusStore(VectorStore, Snapshot):
    """A store in a Milvus collection, and the snapshot of all it holds now.

    Milvus checks its own files, and `clean` leaves nothing to compact.

    An `append` of more than `ROWS` vectors takes several messages, of which each is atomic.
    """

    def __init__(self, uri: str, dim: int, table: str, *, write: bool, new: bool = False):
        self._name, self._dim, self._table = uri, dim, table
        _, self._collection = client.split(uri)
        self._client: Any = client.connect(uri, write=write)
        try:
            with client.milvus_errors(uri):
                self._open(write)
                # Cleaning a new index would delete the vectors of another one.
                if new and (count := len(self)):
                    raise UserError(
                        f"store {uri}: holds {count} vectors of another index; give an empty one, "
                        "with another #COLLECTION at the end"
                    )
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._query(output_fields=["count(*)"])[0]["count(*)"]

    def snapshot(self, db: sqlite3.Connection) -> "MilvusStore":
        return self

    def _ids(self) -> np.ndarray:
        """All ids, int64, sorted."""
        ids: list[int] = []
        with client.milvus_errors(self._name):
            pages = self._client.query_iterator(
                self._collection, batch_size=ROWS, output_fields=["id"], timeout=ANSWER
            )
            while page := pages.next():
                ids += [row["id"] for row in page]
            pages.close()
        return np.sort(np.array(ids, np.int64))

    def get(self, ids: np.ndarray) -> np.ndarray:
        vectors: dict[int, list[float]] = {}
        unique = distinct(np.asarray(ids)).tolist()
        for start in range(0, len(unique), ROWS):
            part = f"id in {unique[start : start + ROWS]}"
            rows = self._query(filter=part, output_fields=["id", "vector"])
            vectors |= {row["id"]: row["vector"] for row in rows}
        if missing := [number for number in unique if number not in vectors]:
            raise UserError(f"store {self._name}: has no id {missing[0]}")
        ordered = [vectors[number] for number in np.asarray(ids).tolist()]
        return np.array(ordered, np.float32).reshape(-1, self._dim)

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if k > MOST and allowed is None:
            allowed = self._ids()  # searched in parts
        filters = [""]
        if allowed is not None:
            listed = distinct(allowed).tolist()
            starts = range(0, len(listed), LISTED)
            filters = [f"id in {listed[start : start + LISTED]}" for start in starts]
        ids = np.full((len(queries), k), NO_ID, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(queries), ROWS):
            block = queries[start : start + ROWS]
            parts = []
            for filter in filters:
                with client.milvus_errors(self._name):
                    parts += [
                        self._client.search(
                            self._collection,
                            data=list(block),
                            limit=min(k, MOST),
                            filter=filter,
                            output_fields=["id"],
                            search_params={"metric_type": "IP"},
                            timeout=ANSWER,
                        )
                    ]
            for i, lists in enumerate(zip(*parts, strict=True), start):
                hits = sorted((-hit["distance"], hit["id"]) for part in lists for hit in part)[:k]
                ids[i, : len(hits)] = [number for _, number in hits]
                scores[i, : len(hits)] = [-negative for negative, _ in hits]
        return ids, scores

    def append(self, db: sqlite3.Connection, vectors: np.ndarray) -> list[int]:
        statement = "UPDATE vectors SET count = count + ? WHERE target = ? RETURNING count"
        ((count,),) = db.execute(statement, (len(vectors), self._table)).fetchall()
        ids = list(range(count - len(vectors), count))
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            rows = zip(ids[part], vectors[part], strict=True)
            data = [{"id": number, "vector": vector} for number, vector in rows]
            with client.milvus_errors(self._name):
                self._client.upsert(self._collection, data, timeout=ANSWER)
        return ids

    def lost(self, db: sqlite3.Connection) -> np.ndarray:
        return np.setdiff1d(named_ids(db, self._table), self._ids(), assume_unique=True)

    def clean(self, db: sqlite3.Connection) -> None:
        dead = np.setdiff1d(self._ids(), named_ids(db, self._table), assume_unique=True)
        for start in range(0, len(dead), LISTED):
            part = dead[start : start + LISTED].tolist()
            with client.milvus_errors(self._name):
                self._client.delete(self._collection, ids=part, timeout=ANSWER)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _query(self, **options: Any) -> list[dict[str, Any]]:
        with client.milvus_errors(self._name):
            return self._client.query(self._collection, timeout=ANSWER, **options)

    def _open(self, write: bool) -> None:
        """Finds or creates the collection and loads it, which a search needs."""
        milvus, name = self._client, self._collection
        if not milvus.has_collection(name, timeout=CONNECT):
            if not write:
                raise UserError(f"store {self._name}: has no collection {name}")
            self._create()
        fields = milvus.describe_collection(name, timeout=CONNECT)["fields"]
        widths = [field["params"].get("dim") for field in fields if field["name"] == "vector"]
        if widths != [self._dim]:
            holds = f"vectors of {widths[0]} numbers" if widths else "no vectors of this program"
            raise UserError(
                f"store {self._name}: collection {name} holds {holds}, not of {self._dim}"
            )
        milvus.load_collection(name, timeout=LOAD)

    def _create(self) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dim)
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        self._client.create_collection(
            self._collection,
            schema=schema,
            index_params=index,
            consistency_level="Strong",
            timeout=ANSWER,
        )
