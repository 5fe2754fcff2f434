"""What tests of the server begin with."""

from tests.search.conftest import clip, retriever

__all__ = ["clip", "retriever"]
