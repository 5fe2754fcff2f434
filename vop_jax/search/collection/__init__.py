"""An index whose files, moments and vectors live in one Milvus database, and nothing on a disk."""
