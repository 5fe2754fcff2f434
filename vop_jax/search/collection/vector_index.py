"""The kinds of vector index that Milvus keeps: exact, or approximate and faster."""

import dataclasses
import re
from typing import Any

from vop_jax.errors import UserError

# Parameters of a search; all others are those of the index.
OF_SEARCH = ("ef", "nprobe", "search_list", "reorder_k")
AT_LEAST_K = ("ef", "search_list")  # must not be smaller than the number of results


@dataclasses.dataclass(frozen=True)
class VectorIndex:
    """A kind of index with its parameters, which Milvus checks.

    Attributes:
        kind: FLAT is exact.
        build, search: parameters.
    """

    kind: str
    build: dict[str, Any]
    search: dict[str, Any]

    def search_params(self, k: int) -> dict[str, Any]:
        """Of a search for k vectors."""
        known = {
            name: max(value, k) if name in AT_LEAST_K else value
            for name, value in self.search.items()
        }
        return {"metric_type": "IP", "params": known}


def parse(text: str) -> VectorIndex:
    """Of a text such as FLAT or HNSW:M=16,efConstruction=200,ef=64.

    Raises:
        UserError: another form.
    """
    kind, _, listed = text.partition(":")
    values: dict[str, Any] = {}
    for part in filter(None, listed.split(",")):
        name, _, value = part.partition("=")
        if not re.fullmatch(r"\w+", name) or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise UserError(f"--vector_index={text}: {part!r} must be NAME=NUMBER")
        values[name] = float(value) if "." in value else int(value)
    if not re.fullmatch(r"[A-Z_0-9]+", kind):
        raise UserError(f"--vector_index={text}: must be KIND:NAME=NUMBER,… as HNSW:M=16,ef=64")
    return VectorIndex(
        kind,
        {name: value for name, value in values.items() if name not in OF_SEARCH},
        {name: value for name, value in values.items() if name in OF_SEARCH},
    )
