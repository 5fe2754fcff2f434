"""An index without videos and without a model; quick to import."""

import pathlib

import numpy as np

from vop_jax.search import catalog
from vop_jax.search.catalog import Catalog, IndexInfo
from vop_jax.search.stores.base import named_ids


class Shelf:
    """Of files that each have one moment."""

    def __init__(self, directory, dim=8, store="", prompts=""):
        self.directory, self._made = pathlib.Path(directory), 0
        self.directory.mkdir(exist_ok=True)
        self.info = IndexInfo(
            catalog.VERSION,
            *("", "c", "CLIP", "", prompts, "zero_shot"),
            3,
            dim,
            2.0,
            1.0,
            "/",
            store,
        )
        self.catalog = Catalog.open(directory, self.info)
        self.db = self.catalog._db
        self.db.execute("PRAGMA synchronous = OFF")  # no test pulls the plug

    def add(self, vectors, also=lambda: None):
        """A file of each vector; their ids. `also` happens in the same transaction."""
        with self.catalog.transaction():
            ids = self.catalog.store_vectors("moments", np.asarray(vectors))
            for number in ids:
                self.catalog.add(f"{self._made}.mp4", 1, 1, "", [(0.0, 1.0)], [number])
                self._made += 1
            also()
        return ids

    def remove(self, ids):
        with self.catalog.transaction():
            statement = "DELETE FROM files WHERE id IN (SELECT file FROM moments WHERE id = ?)"
            self.db.executemany(statement, ((int(number),) for number in ids))

    @property
    def vectors(self):
        """What can be searched now."""
        return self.catalog._stores["moments"].snapshot(self.db)

    @property
    def ids(self):
        return named_ids(self.db, "moments")

    def heap(self):
        return next(self.directory.glob("*-moments-*.f32"))

    def close(self):
        self.catalog.close()
