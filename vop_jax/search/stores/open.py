"""Opens the store of an index by its address."""

import os

from vop_jax.errors import UserError
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.stores.base import VectorStore
from vop_jax.search.stores.heap import Heap


def open_store(
    directory: str | os.PathLike, info: IndexInfo, table: str, *, write: bool, new: bool = False
) -> VectorStore:
    """Opens the vectors of an index.

    Args:
        directory: of the index; it holds the vectors unless `info.store` is another place: a folder
            (exact search over a memory-mapped file); a file ending in ".db" or "milvus-lite:FILE"
            (Milvus Lite); "http://HOST:PORT" or "https://…" (a Milvus server). #COLLECTION at the
            end names a Milvus collection other than "vop_jax". Captions stay in `directory`.
        table: of the catalog, whose vectors they are.
        write: opens it to change it, as the only writer; a missing store is created.
        new: refuses a database that holds vectors.

    Raises:
        UserError: the store is missing, has another width or belongs to another index; a package
            is missing; a database does not answer.
    """
    uri = info.store if table == "moments" else ""
    if uri.startswith(("milvus-lite:", "http://", "https://")) or uri.split("#")[0].endswith(".db"):
        from vop_jax.search.stores.milvus import MilvusStore

        return MilvusStore(uri, info.dim, table, write=write, new=new)
    if "://" in uri:
        raise UserError(f"store {uri}: must be a local folder, FILE.db or http(s)://HOST:PORT")
    return Heap(uri or directory, info.dim, table, write=write)
