"""MSVD: about 41 captions of each video."""

import io
import pickle
from typing import Any

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import (
    Benchmark,
    Captions,
    Size,
    caption,
    clips_of,
    expect,
    find,
    identifier,
    read_json,
    read_list,
)
from vop_jax.errors import UserError

FILES = {
    split: (f"msvd_{split}_list.txt", f"{split}_list.txt") for split in ("train", "val", "test")
}
CAPTIONS = ("captions_msvd.json", "raw-captions.pkl")


def read(folder: epath.Path, split: str) -> tuple[list[VideoClip], list[str]]:
    """Clips of a split with all their captions, repeated ones too, as the counts have it.

    Raises:
        UserError: a file is missing or not as published.
    """
    notes: list[str] = []
    path = find(folder, FILES[split])
    described = find(folder, CAPTIONS)
    ids = read_list(path, notes)
    pickled = described.suffix == ".pkl"
    value = read_pickle(described) if pickled else read_json(described, notes)
    captions = captions_by_id(described, value)
    return clips_of((path, ids), (described, captions), lambda name: f"{name}.avi", notes), notes


def captions_by_id(path: epath.Path, value: object) -> Captions:
    """The captions of {id: [caption or list of words]}.

    Raises:
        UserError: the value is not of that kind.
    """
    captions: Captions = {}
    for key, own in expect(str(path), value, dict).items():
        name = identifier(str(path), key)
        where = f"{path}: {name}"
        texts = (_joined(where, text) for text in expect(where, own, list))
        captions.setdefault(name, []).extend(caption(where, text) for text in texts)
    return captions


def _joined(where: str, text: object) -> object:
    return " ".join(caption(where, word) for word in text) if isinstance(text, list) else text


class _DataOnly(pickle._Unpickler):  # the one in C reserves memory that a damaged file asks for
    """Builds texts, numbers, lists and dicts; what could run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: epath.Path) -> object:
    """The value of a pickle that holds data alone.

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


MSVD = Benchmark(
    "msvd",
    "MSVD, test with all captions",
    FILES,
    {"train": Size(1200, 48_774), "val": Size(100, 4290), "test": Size(670, 27_763)},
    read,
)
