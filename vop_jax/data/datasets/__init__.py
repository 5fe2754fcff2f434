"""One file a dataset: how its annotations are read."""
