"""Vectors in Milvus: in a local folder by Milvus Lite, or on a server that others share.

    FILE.db, milvus-lite:FILE      Milvus Lite, in this process; one process at a time
    http(s)://HOST:PORT            a server; its token is taken from MILVUS_TOKEN
    either with #NAME behind it    another collection than "vop_jax"

The index is FLAT and the metric IP: what is found is exact.
"""

import collections
import contextlib
import logging
import os
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from vop_jax.errors import UserError
from vop_jax.search.stores.base import (
    MOST,
    NO_ID,
    checked_ids,
    checked_k,
    checked_vectors,
    distinct,
    named_ids,
)

COLLECTION = "vop_jax"
CONNECT, ANSWER, LOAD = 5.0, 20.0, 120.0  # seconds to wait for a server
ROWS = 4096  # in one message: 8 MB of 512 floats
LISTED = 10_000  # ids in one filter


class MilvusStore:
    """A `VectorStore` in a Milvus collection. What others write is seen at once.

    An `append` of more than `ROWS` vectors goes in several messages, of which each is atomic.
    """

    def __init__(self, uri: str, dim: int, table: str, *, write: bool, new: bool = False):
        self._name, self._dim, self._table, self._write = uri, dim, table, write
        address, _, collection = uri.partition("#")
        self._collection = collection or COLLECTION
        self._lite = ""
        self._client: Any = None
        client_class = _import()
        try:
            if "://" not in address:
                path = os.path.abspath(address.removeprefix("milvus-lite:"))
                address = start(uri, path, write=write)
                self._lite = path
            token = "" if self._lite else os.environ.get("MILVUS_TOKEN", "")
            with self._told():
                self._client = client_class(
                    uri=address, token=token, timeout=CONNECT, dedicated=True
                )
                self._open()
                # A new index would take the vectors of another for what a kill left of its own.
                if new and (count := len(self)):
                    raise UserError(
                        f"store {uri}: holds {count} vectors of another index; give an empty one, "
                        "with another #COLLECTION behind it"
                    )
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._query(output_fields=["count(*)"])[0]["count(*)"]

    def snapshot(self, db: sqlite3.Connection) -> "MilvusStore":
        """What there is now: a database shows at once what others write."""
        return self

    def check(self) -> None:
        """Nothing to do: a database sees to its own files."""

    def _ids(self) -> np.ndarray:
        """All ids, int64, sorted."""
        found: list[int] = []
        with self._told():
            pages = self._client.query_iterator(
                self._collection, batch_size=ROWS, output_fields=["id"], timeout=ANSWER
            )
            while page := pages.next():
                found += [row["id"] for row in page]
            pages.close()
        return np.sort(np.array(found, np.int64))

    def get(self, ids: np.ndarray) -> np.ndarray:
        """float32 [N, E] of ids [N]."""
        ids = checked_ids(ids)
        wanted, place = np.unique(ids, return_inverse=True)
        vectors = np.empty((len(wanted), self._dim), np.float32)
        there = np.zeros(len(wanted), bool)
        for start in range(0, len(wanted), ROWS):
            part = wanted[start : start + ROWS].tolist()
            for row in self._query(filter=f"id in {part}", output_fields=["id", "vector"]):
                at = np.searchsorted(wanted, row["id"])
                vectors[at], there[at] = row["vector"], True
        if not there.all():
            raise UserError(f"store {self._name}: has no id {wanted[~there][0]}")
        return vectors[place]

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k of all or of the allowed ids, see `VectorStore.search`."""
        queries, k = checked_vectors(queries, self._dim, "queries"), checked_k(k)
        filters = [""]
        if allowed is not None:
            listed = distinct(checked_ids(allowed)).tolist()
            starts = range(0, len(listed), LISTED)
            filters = [f"id in {listed[start : start + LISTED]}" for start in starts]
        ids = np.full((len(queries), k), NO_ID, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if k > MOST and len(self) > MOST:
            raise UserError(f"store {self._name}: k={k}; Milvus finds {MOST} at most")
        for start in range(0, len(queries), ROWS):
            block = queries[start : start + ROWS]
            lists = [self._find(block, min(k, MOST), f) for f in filters]
            for i, of_query in enumerate(zip(*lists, strict=True), start):  # none: no ids allowed
                hits = sorted(hit for part in of_query for hit in part)[:k]
                ids[i, : len(hits)] = [id for _, id in hits]
                scores[i, : len(hits)] = [-negative for negative, _ in hits]
        return ids, scores

    def append(self, db: sqlite3.Connection, vectors: np.ndarray) -> np.ndarray:
        """Adds vectors; Milvus has them in its log when this returns. See `VectorStore.append`."""
        vectors = checked_vectors(vectors, self._dim)
        self._must_write()
        statement = "UPDATE vectors SET count = count + ? WHERE target = ? RETURNING count"
        ((count,),) = db.execute(statement, (len(vectors), self._table)).fetchall()
        ids = np.arange(count - len(vectors), count)
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            rows = zip(ids[part].tolist(), vectors[part], strict=True)
            data = [{"id": id, "vector": vector} for id, vector in rows]
            with self._told():
                self._client.upsert(self._collection, data, timeout=ANSWER)
        return ids

    def lost(self, db: sqlite3.Connection) -> np.ndarray:
        """int64 ids that the catalog names and Milvus does not have."""
        return np.setdiff1d(named_ids(db, self._table), self._ids(), assume_unique=True)

    def is_sparse(self, db: sqlite3.Connection) -> bool:
        """Nothing to do: `clean` removes what is dead."""
        return False

    def compact(self, db: sqlite3.Connection) -> None:
        """Nothing to do."""

    def clean(self, db: sqlite3.Connection) -> None:
        """Removes vectors that the catalog does not name, also those of a run that was killed."""
        self._must_write()
        gone = np.setdiff1d(self._ids(), named_ids(db, self._table), assume_unique=True)
        for start in range(0, len(gone), LISTED):
            part = gone[start : start + LISTED].tolist()
            with self._told():
                self._client.delete(self._collection, ids=part, timeout=ANSWER)

    def close(self) -> None:
        """Lets go of the connection, and of Milvus Lite's folder after its last user here."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._lite:
            stop(self._lite)
            self._lite = ""

    def _find(self, queries: np.ndarray, k: int, filter: str) -> list[list[tuple[float, int]]]:
        """(negative score, id) of at least the best k, and of all that tie with the last."""
        limit = min(k + 1, MOST)
        while True:
            with self._told():
                found = self._client.search(
                    self._collection,
                    data=list(queries),
                    limit=limit,
                    filter=filter,
                    output_fields=["id"],
                    search_params={"metric_type": "IP"},
                    timeout=ANSWER,
                )
            lists = [[(-hit["distance"], hit["id"]) for hit in hits] for hits in found]
            cut = any(
                len(hits) == limit and k < limit and hits[k - 1][0] == hits[-1][0] for hits in lists
            )
            if not cut or limit == MOST:
                return lists
            limit = min(4 * limit, MOST)

    def _query(self, **what: Any) -> list[dict[str, Any]]:
        with self._told():
            return self._client.query(self._collection, timeout=ANSWER, **what)

    def _open(self) -> None:
        """Finds or makes the collection, and loads it: what is not loaded cannot be searched."""
        client, name = self._client, self._collection
        if not client.has_collection(name, timeout=CONNECT):
            if not self._write:
                raise UserError(f"store {self._name}: has no collection {name}")
            self._make()
        fields = client.describe_collection(name, timeout=CONNECT)["fields"]
        widths = [field["params"].get("dim") for field in fields if field["name"] == "vector"]
        if widths != [self._dim]:
            holds = f"vectors of {widths[0]} numbers" if widths else "no vectors of this program"
            raise UserError(
                f"store {self._name}: collection {name} holds {holds}, not of {self._dim}"
            )
        client.load_collection(name, timeout=LOAD)

    def _make(self) -> None:
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

    def _must_write(self) -> None:
        if not self._write:
            raise UserError(f"store {self._name}: is open to read only")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Milvus' own errors become one line."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, RpcError, ValueError) as error:
            reason = getattr(error, "message", "") or str(error)
            raise UserError(f"store {self._name}: {' '.join(reason.split())[:300]}") from None


def _import() -> Any:
    """`MilvusClient`, quiet: what it would say is in its errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pymilvus import MilvusClient
    except ImportError as error:
        raise UserError(f'Milvus: {error}; pip install -e ".[milvus]"') from None
    for name in ("pymilvus", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return MilvusClient


_users: collections.Counter[str] = collections.Counter()  # by path
_lock = threading.Lock()


def start(name: str, path: str, *, write: bool) -> str:
    """The address of Milvus Lite over a folder, started if no other store here uses it.

    Raises:
        UserError: nothing there to read, a file of that name, another process has it open.
    """
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise UserError(f'Milvus Lite: {error}; pip install -e ".[milvus]"') from None
    if os.path.isfile(path):
        raise UserError(f"store {name}: is a file; Milvus Lite 3 keeps a folder of that name")
    if not write and not os.path.isdir(path):
        raise UserError(f"store {name}: no vector store")
    with _lock:
        address = server_manager_instance.start_and_get_uri(path)
        if address is None:
            raise UserError(
                f"store {name}: Milvus Lite cannot open it; only one process at a time may"
            )
        _users[path] += 1
    return address


def stop(path: str) -> None:
    """One user less of the folder; after the last, another process may open it."""
    from milvus_lite.server_manager import server_manager_instance

    with _lock:
        _users[path] -= 1
        if not _users[path]:
            server_manager_instance.release_server(path)
