"""Finds datasets: each file of this folder that defines `DATASET` is one, by the file's name."""

import difflib
import importlib
import pkgutil

from vop_jax.data import datasets
from vop_jax.data.datasets.source import Source
from vop_jax.errors import UserError


def kinds() -> list[str]:
    """The names that `config.data.kind` may have, sorted."""
    names = sorted(module.name for module in pkgutil.iter_modules(datasets.__path__))
    return [name for name in names if _load(name) is not None]


def get(kind: str) -> Source:
    """The dataset of that name; imports no other dataset's file.

    Raises:
        UserError: there is none; the message lists the names.
    """
    modules = {module.name for module in pkgutil.iter_modules(datasets.__path__)}
    source = _load(kind) if kind in modules else None
    if source is None:
        close = difflib.get_close_matches(kind, kinds(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"config.data.kind={kind!r}: no such dataset; allowed are {', '.join(kinds())}{hint}"
        )
    return source


def _load(name: str) -> Source | None:
    module = importlib.import_module(f"{datasets.__name__}.{name}")
    return getattr(module, "DATASET", None)
