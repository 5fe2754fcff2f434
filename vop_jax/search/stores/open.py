"""Opens the store of an index by its address."""

import os
from typing import TYPE_CHECKING

from vop_jax.errors import UserError
from vop_jax.search.stores.base import VectorStore

if TYPE_CHECKING:
    from vop_jax.search.catalog import IndexInfo


def open_store(
    directory: str | os.PathLike, info: "IndexInfo", table: str, *, write: bool, new: bool = False
) -> VectorStore:
    """Opens the vectors of an index.

    Args:
        directory: of the index, where they lie unless `info.store` is another place: a folder
            (exact search over a memory-mapped file); a file ending ".db" or "milvus-lite:FILE"
            (Milvus Lite); "http://HOST:PORT" or "https://…" (a Milvus server); of Milvus with
            #COLLECTION behind it, else "vop_jax". Captions are few enough for `directory`.
        table: of the catalog, whose vectors they are.
        write: to change it, as the only one; it is made if it is not there.
        new: for an index that is being made, so that no vectors may be there.

    Raises:
        UserError: no such store, one of another width or another index, a missing extra, a
            database that does not answer.
    """
    uri = info.store if table == "moments" else ""
    local, _, _ = uri.partition("#")
    if uri.startswith(("milvus-lite:", "http://", "https://")) or local.endswith(".db"):
        from vop_jax.search.stores.milvus import MilvusStore

        return MilvusStore(uri, info.dim, table, write=write, new=new)
    if "://" in uri:
        raise UserError(f"store {uri}: must be a local folder, FILE.db or http(s)://HOST:PORT")
    from vop_jax.search.stores.heap import Heap

    return Heap(uri or directory, info.dim, table, write=write)
