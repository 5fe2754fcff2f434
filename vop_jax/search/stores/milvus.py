"""Vectors in Milvus: in a local folder by Milvus Lite, or on a server that others share.

    FILE.db, milvus-lite:FILE      Milvus Lite, in this process; one process at a time
    http(s)://HOST:PORT            a server; the environment variable MILVUS_TOKEN has its token
    either with #NAME at the end   another collection than "vop_jax"

The index is FLAT and the metric IP, so searches are exact; among equal scores at the last place
Milvus chooses.
"""

import contextlib
import logging
import os
import sqlite3
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.stores.base import NO_ID, Snapshot, VectorStore, distinct, named_ids

COLLECTION = "vop_jax"
CONNECT, ANSWER, LOAD = 5.0, 20.0, 120.0  # seconds to wait for a server
MOST = 16_384  # results of one search: Milvus' own limit
ROWS = 4096  # in one message: 8 MB of 512 floats
LISTED = 10_000  # ids in one filter; fewer than MOST


class MilvusStore(VectorStore, Snapshot):
    """A store in a Milvus collection, and the snapshot of all it holds now.

    Milvus checks its own files, and `clean` leaves nothing to compact.

    An `append` of more than `ROWS` vectors takes several messages, of which each is atomic.
    """

    def __init__(self, uri: str, dim: int, table: str, *, write: bool, new: bool = False):
        self._name, self._dim, self._table = uri, dim, table
        self._collection = uri.partition("#")[2] or COLLECTION
        self._client: Any = connect(uri, write=write)
        try:
            with self._milvus_errors():
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
        with self._milvus_errors():
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
                with self._milvus_errors():
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
            with self._milvus_errors():
                self._client.upsert(self._collection, data, timeout=ANSWER)
        return ids

    def lost(self, db: sqlite3.Connection) -> np.ndarray:
        return np.setdiff1d(named_ids(db, self._table), self._ids(), assume_unique=True)

    def clean(self, db: sqlite3.Connection) -> None:
        dead = np.setdiff1d(self._ids(), named_ids(db, self._table), assume_unique=True)
        for start in range(0, len(dead), LISTED):
            part = dead[start : start + LISTED].tolist()
            with self._milvus_errors():
                self._client.delete(self._collection, ids=part, timeout=ANSWER)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _query(self, **options: Any) -> list[dict[str, Any]]:
        with self._milvus_errors():
            return self._client.query(self._collection, timeout=ANSWER, **options)

    def _open(self, write: bool) -> None:
        """Finds or creates the collection and loads it, which a search needs."""
        client, name = self._client, self._collection
        if not client.has_collection(name, timeout=CONNECT):
            if not write:
                raise UserError(f"store {self._name}: has no collection {name}")
            self._create()
        fields = client.describe_collection(name, timeout=CONNECT)["fields"]
        widths = [field["params"].get("dim") for field in fields if field["name"] == "vector"]
        if widths != [self._dim]:
            holds = f"vectors of {widths[0]} numbers" if widths else "no vectors of this program"
            raise UserError(
                f"store {self._name}: collection {name} holds {holds}, not of {self._dim}"
            )
        client.load_collection(name, timeout=LOAD)

    def _create(self) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dim)
        self._client.create_collection(
            self._collection,
            schema=schema,
            index_params=vector_index(self._client),
            consistency_level="Strong",
            timeout=ANSWER,
        )

    def _milvus_errors(self) -> contextlib.AbstractContextManager[None]:
        return milvus_errors(self._name)


def connect(uri: str, *, write: bool) -> Any:
    """A client of the server, or of Milvus Lite, that a URI names.

    Raises:
        UserError: it does not answer, or there is nothing to read.
    """
    address, token = uri.partition("#")[0], os.environ.get("MILVUS_TOKEN", "")
    client_class = _import_client()
    if "://" not in address:
        path = os.path.abspath(address.removeprefix("milvus-lite:"))
        address, token = _start_lite(uri, path, write=write), ""
    with milvus_errors(uri):
        return client_class(uri=address, token=token, timeout=CONNECT, dedicated=True)


def vector_index(client: Any) -> Any:
    """How Milvus searches the vectors of a collection."""
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="IP")
    return index


@contextlib.contextmanager
def milvus_errors(name: str) -> Iterator[None]:
    """Turns the errors of Milvus into one line that names the store."""
    from grpc import RpcError
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, RpcError, ValueError) as error:
        reason = " ".join((getattr(error, "message", "") or str(error)).split())[:300]
        if "auth" in reason.lower():
            reason += "; set the environment variable MILVUS_TOKEN to USER:PASSWORD or a key"
        raise UserError(f"store {name}: {reason}") from None


def _import_client() -> Any:
    """`MilvusClient`, without its logs: its errors say the same."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pymilvus import MilvusClient
    except ImportError as error:
        raise UserError(f'Milvus: {error}; pip install -e ".[milvus]"') from None
    for name in ("pymilvus", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return MilvusClient


def _start_lite(name: str, path: str, *, write: bool) -> str:
    """The address of Milvus Lite over a folder; it runs until this process ends.

    Raises:
        UserError: no folder to read, a file of that name, another process has it open.
    """
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise UserError(f'Milvus Lite: {error}; pip install -e ".[milvus]"') from None
    if os.path.isfile(path):
        raise UserError(f"store {name}: is a file; Milvus Lite 3 keeps a folder of that name")
    if not write and not os.path.isdir(path):
        raise UserError(f"store {name}: no vector store")
    address = server_manager_instance.start_and_get_uri(path)
    if address is None:
        raise UserError(f"store {name}: Milvus Lite cannot open it; only one process at a time may")
    return address
