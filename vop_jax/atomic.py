"""Files that are whole or not there."""

import json
import os
from typing import Any

from etils import epath


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Writes `path` whole or not at all: a temporary file beside it, then a rename."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
