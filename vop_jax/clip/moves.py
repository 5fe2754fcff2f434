"""How one PyTorch tensor becomes a parameter of ours, and back."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Move(NamedTuple):
    """From a PyTorch tensor to our parameter of a given shape, and back."""

    source_shape: Callable[[Shape], Shape]  # ours -> PyTorch's
    convert: Callable[[np.ndarray, Shape], np.ndarray]
    back: Callable[[np.ndarray, Shape], np.ndarray]


def _transposed(x: np.ndarray, shape: Shape) -> np.ndarray:
    """The transpose of a matrix, or of one whose rows or columns are cut into heads."""
    return x.reshape(shape[::-1]).T


SAME = Move(lambda s: s, lambda x, s: x, lambda x, s: x)
TRANSPOSE = Move(lambda s: s[::-1], lambda x, s: x.T, _transposed)  # [out, in] -> [in, out]
IMAGE_KERNEL = Move(  # [D, C, h, w] -> [h, w, C, D]
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda x, s: x.transpose(2, 3, 1, 0),
    lambda x, s: x.transpose(3, 2, 0, 1),
)
# [D, D] -> [D, H, D/H], and its bias [D] -> [H, D/H]
TO_HEADS = Move(lambda s: (s[1] * s[2], s[0]), lambda x, s: x.T.reshape(s), _transposed)
TO_HEADS_BIAS = Move(lambda s: (s[0] * s[1],), lambda x, s: x.reshape(s), lambda x, s: x.reshape(s))
# [D, D] -> [H, D/H, D]
FROM_HEADS = Move(lambda s: (s[2], s[0] * s[1]), lambda x, s: x.T.reshape(s), _transposed)

# The tensors of a module: (PyTorch's ending, ours, move).
BARE = (("", "", SAME),)
RIGHT_FACTOR = (("", "/kernel", SAME),)  # a matrix used as x @ matrix
PROJECTION = ((".weight", "/kernel", TRANSPOSE),)
EMBEDDING = ((".weight", "/embedding", SAME),)
POSITIONS = ((".weight", "", SAME),)
CONV = ((".weight", "/kernel", IMAGE_KERNEL),)
NORM = ((".weight", "/scale", SAME), (".bias", "/bias", SAME))
DENSE = ((".weight", "/kernel", TRANSPOSE), (".bias", "/bias", SAME))
QKV = ((".weight", "/kernel", TO_HEADS), (".bias", "/bias", TO_HEADS_BIAS))
PACKED_QKV = (("_weight", "/kernel", TO_HEADS), ("_bias", "/bias", TO_HEADS_BIAS))
OUT = ((".weight", "/kernel", FROM_HEADS), (".bias", "/bias", SAME))
