"""MSVD: about 41 captions of each video."""

import io
import pickle
from typing import Any

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import AnnotationFiles, captions_by_id
from vop_jax.data.datasets.source import Benchmark, SplitSize
from vop_jax.errors import UserError

FILES = {
    split: (f"msvd_{split}_list.txt", f"{split}_list.txt") for split in ("train", "val", "test")
}
CAPTIONS = ("captions_msvd.json", "raw-captions.pkl")


def read_split(files: AnnotationFiles, split: str) -> list[VideoClip]:
    """Clips of a split with all captions; published counts include repeated ones."""
    path, described = files.find(FILES[split]), files.find(CAPTIONS)
    ids = files.read_list(path)
    pickled = described.suffix == ".pkl"
    value = read_pickle(described) if pickled else files.read_json(described)
    return files.clips((path, ids), (described, captions_by_id(described, value)), "{}.avi".format)


class _DataOnly(pickle._Unpickler):  # the one in C reserves memory that a damaged file asks for
    """Builds texts, numbers, lists and dicts; refuses what could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: epath.Path) -> object:
    """The value of a pickle that contains plain data only.

    Raises:
        UserError: it is damaged, or needs anything beyond data.
    """
    try:
        return _DataOnly(io.BytesIO(path.read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        reason = f"{type(error).__name__}: {error}"[:100]
        raise UserError(
            f"{path}: no pickle of plain data ({reason!r}); {CAPTIONS[0]} is accepted too"
        ) from None


DATASET = Benchmark(
    "msvd",
    "MSVD, test with all captions",
    {
        "train": SplitSize(1200, 48_774),
        "val": SplitSize(100, 4290),
        "test": SplitSize(670, 27_763),
    },
    FILES,
    read_split,
)
