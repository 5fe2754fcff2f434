"""The demo's data: clips and stills of coloured shapes with captions, rendered here.

A clip shows one shape that crosses the picture; its caption tells colour, shape, speed,
direction and place. The held-out clips come in pairs that differ in direction only, and the
two of a pair are the same pictures in opposite order: a model that is blind to the order of
frames cannot tell them apart. A still's caption tells size, colour, shape and place, so a CLIP
trained on stills has met neither motion nor the words for it.
"""

import csv
import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from vop_jax.errors import UserError
from vop_jax.storage.files import write_atomic

SIZE = 64  # height and width, pixels
FRAMES = 24  # of a clip: 8 uniform samples of it, reversed, are 8 uniform samples
RATE = 12  # frames per second
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
SPEEDS = {"slowly": 26, "quickly": 46}  # pixels travelled in a clip
DIRECTIONS = (("up", "down"), ("to the left", "to the right"))  # backward, forward; per axis
# A clip's place is told across its motion: a column for up and down, a row for left and right.
PLACES = (
    ("on the left", "in the middle", "on the right"),
    ("at the top", "in the middle", "at the bottom"),
)
RADII = {"small": (5.0, 7.0), "large": (9.0, 12.0)}  # pixels
THIRDS = (16, 32, 48)  # centres of rows and of columns, pixels
SPOTS = (  # where a still's shape is: row, column
    ("in the upper left corner", "at the upper edge", "in the upper right corner"),
    ("at the left edge", "in the centre", "at the right edge"),
    ("in the lower left corner", "at the lower edge", "in the lower right corner"),
)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One shape on its way over a soft backdrop.

    Attributes:
        start, end: the shape's centre (y, x) in the first and the last picture, pixels.
        backdrop: uint8 [4, 4, 3], enlarged smoothly to the whole picture.
        backward: the same pictures in opposite order.
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
    """One file to be: its row of the annotations, and what it shows."""

    video: str
    caption: str
    split: str
    scene: Scene


def render(
    directory: str,
    *,
    seed: int = 0,
    train: int = 768,
    val: int = 192,
    test: int = 192,
    threads: int = 2,
) -> str:
    """Writes H.264 clips of moving shapes and their annotations; what is there already is kept.

    Args:
        directory: where the clips and `annotations.csv` (video, caption, split) go.
        seed: of captions and appearance; equal seeds give equal files.
        train: clips of that split; each full round of 768 has every caption once.
        val, test: held-out clips, all captions distinct, in pairs of opposite directions.
        threads: clips drawn and encoded at a time.

    Returns:
        The path of the annotations, written last.

    Raises:
        UserError: a number of clips that cannot be.
    """
    items = clip_items(seed, train, val, test)
    return _write(directory, items, encode_clip, threads, "rendering clips")


def render_stills(
    directory: str, *, seed: int = 0, train: int = 2500, test: int = 64, threads: int = 2
) -> str:
    """Writes PNG stills of shapes and their annotations; otherwise as `render`."""
    items = still_items(seed, train, test)
    return _write(directory, items, encode_still, threads, "rendering stills")


def clip_items(seed: int, train: int, val: int, test: int) -> list[Item]:
    """The clips of all splits, see `render`; clip i of a split is the same for any count."""
    subjects = list(itertools.product(COLOURS, SHAPES, SPEEDS, (0, 1), range(3)))
    captions = [(subject, sense) for subject in subjects for sense in (0, 1)]
    held_out = {"val": (8, val), "test": (2, test)}  # split -> (code of its draws, clips)
    if train < 0 or any(not 0 <= n <= len(captions) or n % 2 for _, n in held_out.values()):
        raise UserError(
            f"train={train}, val={val}, test={test} clips: train must be 0 or more, val and test "
            f"even numbers up to {len(captions)}, for distinct captions in pairs"
        )
    items = []
    for i, (subject, sense) in enumerate(_dealt(captions, train, seed, 0)):
        rng = np.random.default_rng((seed, 1, i))
        items.append(_clip(f"train-seed{seed}-{i:05}.mp4", "train", rng, subject, sense))
    for split, (code, count) in held_out.items():
        for pair, subject in enumerate(_dealt(subjects, count // 2, seed, code)):
            for sense in (0, 1):
                rng = np.random.default_rng((seed, code + 1, pair))  # one appearance for both
                video = f"{split}-seed{seed}-{2 * pair + sense:05}.mp4"
                items.append(_clip(video, split, rng, subject, sense))
    return items


def still_items(seed: int, train: int, test: int) -> list[Item]:
    """The stills of both splits, see `render_stills`."""
    if train < 0 or test < 0:
        raise UserError(f"train={train}, test={test} stills: must be 0 or more")
    subjects = list(itertools.product(RADII, COLOURS, SHAPES, range(3), range(3)))
    items = []
    for code, split, count in ((4, "train", train), (6, "test", test)):
        dealt = _dealt(subjects, count, seed, code)
        for i, (size, colour, shape, row, column) in enumerate(dealt):
            rng = np.random.default_rng((seed, code + 1, i))
            centre = THIRDS[row] + rng.uniform(-4, 4), THIRDS[column] + rng.uniform(-4, 4)
            scene = Scene(colour, shape, rng.uniform(*RADII[size]), centre, centre, _backdrop(rng))
            caption = f"{SPOTS[row][column]}, a {size} {colour} {shape}"
            items.append(Item(f"{split}-seed{seed}-{i:05}.png", caption, split, scene))
    return items


def _dealt(deck: Sequence[Any], count: int, *key: int) -> list[Any]:
    """The first `count` of rounds that deal the whole deck, each in an order of its own."""
    rounds = range(-(-count // len(deck)))
    orders = [np.random.default_rng((*key, r)).permutation(len(deck)) for r in rounds]
    return [deck[k] for order in orders for k in order][:count]


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
    scene = Scene(
        colour, shape, rng.uniform(6, 10), start, end, _backdrop(rng), backward=sense == 0
    )
    direction = DIRECTIONS[axis][sense]
    caption = f"a {colour} {shape} moves {speed} {direction} {PLACES[axis][place]}"
    return Item(video, caption, split, scene)


def _backdrop(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(50, 110)
    return np.rint(grey + rng.uniform(-25, 25, (4, 4, 3))).astype(np.uint8)


def contrasts(caption: str) -> dict[str, str]:
    """A clip's caption with one thing turned: {"direction": …, "speed": …}.

    The first is the caption of the same pictures in opposite order, the second of the same
    way travelled at the other speed.

    Raises:
        ValueError: not a clip's caption.
    """
    slow, quick = SPEEDS
    return {
        "direction": _exchange(caption, DIRECTIONS),
        "speed": _exchange(caption, [(slow, quick)]),
    }


def _exchange(caption: str, pairs: Sequence[tuple[str, str]]) -> str:
    for here, there in [*pairs, *((b, a) for a, b in pairs)]:
        if f" {here} " in caption:
            return caption.replace(f" {here} ", f" {there} ", 1)
    raise ValueError(f"{caption!r}: has none of {', '.join(word for p in pairs for word in p)}")


def encode_clip(scene: Scene) -> bytes:
    """FRAMES pictures as H.264 in mp4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread and no look-ahead (zerolatency): with either, equal pictures were now and
        # then encoded to different bytes.
        options = {"crf": "16", "preset": "veryfast", "tune": "zerolatency", "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in scene.draw(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_still(scene: Scene) -> bytes:
    """One picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(scene.draw(1)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def _write(
    directory: str,
    items: Sequence[Item],
    encode: Callable[[Scene], bytes],
    threads: int,
    title: str,
) -> str:
    """Writes the files that are missing, then the annotations; every file whole or not at all."""
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
        for _ in tqdm(pool.map(write, items), desc=title, total=len(items), unit="file"):
            pass
    write_atomic(annotations, table.getvalue().encode())
    return str(annotations)
