"""Draws coloured shapes, still or moving, for the demo's datasets `clips` and `stills`."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from vop_jax.storage.files import write_atomic

SIZE = 64  # height and width, pixels
THIRDS = (16, 32, 48)  # centres of rows and of columns, pixels
ANNOTATIONS_FILE = "annotations.csv"

COLOURS = {
    "red": (225, 35, 35),
    "black": (12, 12, 12),
    "yellow": (245, 230, 40),
    "green": (40, 180, 60),
    "cyan": (60, 220, 230),
    "blue": (40, 70, 225),
    "purple": (160, 50, 200),
    "white": (245, 245, 245),
}
# Signed distance to the outline, negative inside, at (y, x) from the centre for a radius.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda y, x, r: np.hypot(y, x) - r,
    "square": lambda y, x, r: np.maximum(abs(y), abs(x)) - 0.9 * r,
    "triangle": lambda y, x, r: np.maximum(y - 0.7 * r, 0.87 * abs(x) - 0.5 * y - 0.6 * r),
    "cross": lambda y, x, r: np.minimum(
        np.maximum(abs(y) - 1.1 * r, abs(x) - 0.35 * r),
        np.maximum(abs(x) - 1.1 * r, abs(y) - 0.35 * r),
    ),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One shape on its way over a soft backdrop.

    Attributes:
        start, end: the shape's centre (y, x) in the first and the last frame, pixels.
        backdrop: uint8 [4, 4, 3], enlarged smoothly to the whole frame.
        backward: the same frames in opposite order.
    """

    colour: str
    shape: str
    radius: float
    start: tuple[float, float]
    end: tuple[float, float]
    backdrop: np.ndarray
    backward: bool = False

    def draw(self, frames: int) -> np.ndarray:
        """uint8 [F, SIZE, SIZE, 3]."""
        coarse = Image.fromarray(self.backdrop)
        backdrop = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        share = np.linspace(0, 1, frames)[:: -1 if self.backward else 1, None, None]
        pixel = np.arange(SIZE) + 0.5
        y = pixel[:, None] - (self.start[0] + share * (self.end[0] - self.start[0]))  # [F, H, 1]
        x = pixel[None, :] - (self.start[1] + share * (self.end[1] - self.start[1]))  # [F, 1, W]
        distance = SHAPES[self.shape](y, x, self.radius)  # [F, H, W]
        cover = np.clip(0.5 - distance, 0, 1)[..., None]  # edges one pixel soft
        return np.rint(cover * COLOURS[self.colour] + (1 - cover) * backdrop).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Item:
    """A file to render: its row of the annotations, and what it shows."""

    video: str
    caption: str
    split: str
    scene: Scene


def draw_backdrop(rng: np.random.Generator) -> np.ndarray:
    """A random grey `Scene.backdrop`, uint8 [4, 4, 3]."""
    grey = rng.uniform(50, 110)
    return np.rint(grey + rng.uniform(-25, 25, (4, 4, 3))).astype(np.uint8)


def deal(deck: Sequence[Any], count: int, *key: int) -> list[Any]:
    """The first `count` of rounds that deal the whole deck, each in its own order."""
    rounds = range(-(-count // len(deck)))
    orders = [np.random.default_rng((*key, r)).permutation(len(deck)) for r in rounds]
    return [deck[k] for order in orders for k in order][:count]


def write_items(
    directory: str, items: Sequence[Item], encode: Callable[[Scene], bytes], threads: int
) -> str:
    """Writes the files that are missing, then the annotations, each whole or not at all.

    Returns:
        The path of the annotations (video, caption, split).
    """
    root = epath.Path(directory)
    annotations = root / ANNOTATIONS_FILE
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("video", "caption", "split"))
    rows.writerows((item.video, item.caption, item.split) for item in items)
    if annotations.exists() and annotations.read_text() == table.getvalue():
        return str(annotations)

    def write(item: Item) -> None:
        path = root / item.video
        if not path.exists():
            write_atomic(path, encode(item.scene))

    root.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as pool:
        progress = tqdm(pool.map(write, items), "rendering", len(items), unit="file")
        for _ in progress:
            pass
    write_atomic(annotations, table.getvalue().encode())
    return str(annotations)
