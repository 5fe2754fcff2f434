"""An index of which all is on a Milvus server, so that many machines write and answer from it."""
