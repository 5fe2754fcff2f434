"""Finds videos, moments and captions by what they show."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vop_jax.search.index import Hit, Index
    from vop_jax.search.searcher import Searcher
    from vop_jax.search.searcher import open_searcher as open

__all__ = ["Hit", "Index", "Searcher", "open"]


def __getattr__(name: str):
    # Lazy: the worker processes that decode start without jax.
    if name in ("Hit", "Index"):
        from vop_jax.search import index

        return getattr(index, name)
    if name in ("Searcher", "open"):
        from vop_jax.search import searcher

        return getattr(searcher, "open_searcher" if name == "open" else name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
