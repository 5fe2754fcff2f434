"""The stills that the demo's CLIP is trained on: one shape each; rendered here.

A caption names size, colour, shape and place, so that the CLIP has met neither motion nor the
words for it.
"""

import io
import itertools
import os
from typing import Any

import numpy as np
from PIL import Image

from vop_jax.data.datasets.folder import Folder
from vop_jax.data.datasets.shapes import (
    COLOURS,
    SHAPES,
    THIRDS,
    Item,
    Scene,
    deal,
    draw_backdrop,
    write_items,
)
from vop_jax.errors import UserError

RADII = {"small": (5.0, 7.0), "large": (9.0, 12.0)}  # pixels
PLACES = (  # row, column
    ("in the upper left corner", "at the upper edge", "in the upper right corner"),
    ("at the left edge", "in the centre", "at the right edge"),
    ("in the lower left corner", "at the lower edge", "in the lower right corner"),
)


class Stills(Folder):
    """The kind `stills`."""

    kind, rendered = "stills", True

    def locations(self, data: Any, workdir: str) -> tuple[str, str]:
        """Renders the stills into `data.videos`, else the workdir; see `Source.locations`."""
        videos = data.videos or os.path.join(workdir, "stills")
        return render(videos), videos


DATASET = Stills()


def render(
    directory: str, *, seed: int = 0, train: int = 2500, test: int = 64, threads: int = 2
) -> str:
    """Writes PNG stills and their annotations; otherwise as `clips.render`."""
    return write_items(directory, still_items(seed, train, test), encode_still, threads)


def still_items(seed: int, train: int, test: int) -> list[Item]:
    """The stills of both splits, see `render`."""
    if train < 0 or test < 0:
        raise UserError(f"train={train}, test={test} stills: must be 0 or more")
    subjects = list(itertools.product(RADII, COLOURS, SHAPES, range(3), range(3)))
    items = []
    for code, split, count in ((4, "train", train), (6, "test", test)):
        subjects_of_split = deal(subjects, count, seed, code)
        for i, (size, colour, shape, row, column) in enumerate(subjects_of_split):
            rng = np.random.default_rng((seed, code + 1, i))
            centre = THIRDS[row] + rng.uniform(-4, 4), THIRDS[column] + rng.uniform(-4, 4)
            radius = rng.uniform(*RADII[size])
            scene = Scene(colour, shape, radius, centre, centre, draw_backdrop(rng))
            caption = f"{PLACES[row][column]}, a {size} {colour} {shape}"
            items.append(Item(f"{split}-seed{seed}-{i:05}.png", caption, split, scene))
    return items


def encode_still(scene: Scene) -> bytes:
    """One frame as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(scene.draw(1)[0]).save(buffer, "PNG")
    return buffer.getvalue()
