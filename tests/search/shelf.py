"""An index without videos and without a model; quick to import."""

import pathlib

import numpy as np

from vop_jax.search import catalog
from vop_jax.search.catalog import IndexInfo
from vop_jax.search.scan import VideoFile
from vop_jax.search.stores.base import named_ids
from vop_jax.search.writer import CatalogWriter

DATE = 1_700_000_000  # of the first file
PLAIN = ("", "c", "CLIP", "")


class Shelf:
    """An index of files 0.mp4, 1.mp4, … in some folders: one changes each day."""

    def __init__(self, directory, dim=8, store="", prompts="", files=0, folders=("",)):
        self.directory, self.files, self.folders = pathlib.Path(directory), files, folders
        self.directory.mkdir(exist_ok=True)
        model = (*PLAIN, prompts, "zero_shot", 3, dim)
        self.info = IndexInfo(catalog.VERSION, *model, 2.0, 1.0, "/", store)
        self.catalog = CatalogWriter(directory, self.info)
        self.db = self.catalog._db
        self.db.execute("PRAGMA synchronous = OFF")  # no test cuts the power

    def add(self, vectors, also=lambda: None):
        """Adds a file for each [E], or for each [moments, E]; the ids of the moments.

        `also` runs in the same transaction.
        """
        files = []
        for number, rows in enumerate(np.asarray(vectors), self.files):
            path = f"{self.folders[number % len(self.folders)]}{number}.mp4"
            file = VideoFile(path, 1, (DATE + 86400 * number) * 10**9)
            rows = np.atleast_2d(rows)
            files.append((file, "", [(float(i), i + 2.0) for i in range(len(rows))], rows))
        self.files += len(files)
        with self.catalog.transaction():
            ids = self.catalog.add_files(files)
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
