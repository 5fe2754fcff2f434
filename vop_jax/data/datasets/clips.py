"""The demo's clips: one shape crosses the frame; rendered here.

A caption names colour, shape, speed, direction and place. The clips of val and test come in
pairs that differ in direction only, and the two of a pair are the same frames in opposite order:
a model that is blind to the order of frames cannot tell them apart.
"""

import io
import itertools
import os
from collections.abc import Sequence
from typing import Any

import av
import numpy as np

from vop_jax.data.datasets.folder import Folder
from vop_jax.data.datasets.shapes import (
    COLOURS,
    SHAPES,
    SIZE,
    THIRDS,
    Item,
    Scene,
    deal,
    draw_backdrop,
    write_items,
)
from vop_jax.errors import UserError

FRAMES = 24  # of a clip: 8 uniform samples of it, reversed, are 8 uniform samples
RATE = 12  # frames per second
SPEEDS = {"slowly": 26, "quickly": 46}  # pixels travelled in a clip
DIRECTIONS = (("up", "down"), ("to the left", "to the right"))  # backward, forward; per axis
# The place is across the motion: a column for up and down, a row for left and right.
PLACES = (
    ("on the left", "in the middle", "on the right"),
    ("at the top", "in the middle", "at the bottom"),
)


class Clips(Folder):
    """The kind `clips`."""

    kind, rendered = "clips", True

    def locations(self, data: Any, workdir: str) -> tuple[str, str]:
        """Renders the clips into `data.videos`, else the workdir; see `Source.locations`."""
        videos = data.videos or os.path.join(workdir, "videos")
        return render(videos, train=data.rendered), videos

    def contrasts(self, caption: str) -> dict[str, str]:
        """A clip's caption with one thing changed: {"direction": …, "speed": …}.

        The first is the caption of the same frames in opposite order, the second that of the same
        way travelled at the other speed.

        Raises:
            ValueError: not a clip's caption.
        """
        slow, quick = SPEEDS
        return {
            "direction": _exchange(caption, DIRECTIONS),
            "speed": _exchange(caption, [(slow, quick)]),
        }


DATASET = Clips()


def render(
    directory: str,
    *,
    seed: int = 0,
    train: int = 768,
    val: int = 192,
    test: int = 192,
    threads: int = 2,
) -> str:
    """Writes H.264 clips and their annotations; keeps the files that exist.

    Args:
        directory: where the clips and `annotations.csv` (video, caption, split) go.
        seed: of captions and appearance; equal seeds give equal files.
        train: clips of that split; each full round of 768 has every caption once.
        val, test: clips of those splits, with distinct captions, in pairs of opposite directions.
        threads: clips drawn and encoded at a time.

    Returns:
        The path of the annotations, which are written last.

    Raises:
        UserError: an impossible number of clips.
    """
    return write_items(directory, clip_items(seed, train, val, test), encode_clip, threads)


def clip_items(seed: int, train: int, val: int, test: int) -> list[Item]:
    """The clips of all splits, see `render`; clip i of a split is the same for any count."""
    subjects = list(itertools.product(COLOURS, SHAPES, SPEEDS, (0, 1), range(3)))
    captions = [(subject, sense) for subject in subjects for sense in (0, 1)]
    paired = {"val": (8, val), "test": (2, test)}  # split -> (code of its draws, clips)
    if train < 0 or any(not 0 <= n <= len(captions) or n % 2 for _, n in paired.values()):
        raise UserError(
            f"train={train}, val={val}, test={test} clips: train must be 0 or more, val and test "
            f"even numbers up to {len(captions)}, for distinct captions in pairs"
        )
    items = []
    for i, (subject, sense) in enumerate(deal(captions, train, seed, 0)):
        rng = np.random.default_rng((seed, 1, i))
        items.append(_clip(f"train-seed{seed}-{i:05}.mp4", "train", rng, subject, sense))
    for split, (code, count) in paired.items():
        for pair, subject in enumerate(deal(subjects, count // 2, seed, code)):
            for sense in (0, 1):
                rng = np.random.default_rng((seed, code + 1, pair))  # one appearance for both
                video = f"{split}-seed{seed}-{2 * pair + sense:05}.mp4"
                items.append(_clip(video, split, rng, subject, sense))
    return items


def _clip(
    video: str,
    split: str,
    rng: np.random.Generator,
    subject: tuple[str, str, str, int, int],
    sense: int,
) -> Item:
    """A clip of colour, shape, speed, axis of motion (0: rows), place; sense 0 runs backward."""
    colour, shape, speed, axis, place = subject
    travel = SPEEDS[speed]
    slack = (SIZE - 10 - travel) / 4
    along = SIZE / 2 + rng.uniform(-slack, slack)
    across = THIRDS[place] + rng.uniform(-4, 4)
    ends = [(along + side * travel / 2, across) for side in (-1, 1)]
    start, end = ends if axis == 0 else [(x, y) for y, x in ends]
    radius = rng.uniform(6, 10)
    scene = Scene(colour, shape, radius, start, end, draw_backdrop(rng), backward=sense == 0)
    direction = DIRECTIONS[axis][sense]
    caption = f"a {colour} {shape} moves {speed} {direction} {PLACES[axis][place]}"
    return Item(video, caption, split, scene)


def _exchange(caption: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in [*pairs, *((b, a) for a, b in pairs)]:
        if f" {old} " in caption:
            return caption.replace(f" {old} ", f" {new} ", 1)
    raise ValueError(f"{caption!r}: has none of {', '.join(word for p in pairs for word in p)}")


def encode_clip(scene: Scene) -> bytes:
    """FRAMES frames as H.264 in mp4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread and no look-ahead (zerolatency): with either, equal frames were now and then
        # encoded to different bytes.
        options = {"crf": "16", "preset": "veryfast", "tune": "zerolatency", "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for pixels in scene.draw(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
