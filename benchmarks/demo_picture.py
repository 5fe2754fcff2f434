"""Draws the README's picture: clips of the demo, and where their captions rank them.

    python -m benchmarks.demo_picture --workdir=/tmp/vop_demo --output=docs/images/demo.png

The clips are every k-th of the held-out ones; none is picked by its rank.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import vop_jax
from vop_jax.evaluation.metrics import rank_pairs
from vop_jax.video.frames import read_frames

ROWS, FRAMES = 6, 8
TILE, GAP, LEFT = 64, 4, 16
INK, SOFT, PAPER = (28, 32, 40), (110, 118, 130), (255, 255, 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of a finished demo")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    args = parser.parse_args()

    with open(args.workdir / "videos/annotations.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    captions = [row["caption"] for row in rows]
    paths = [args.workdir / "videos" / row["video"] for row in rows]
    ranks = {
        "CLIP": text_ranks(args.workdir, captions, paths, tuned=False),
        "VoP": text_ranks(args.workdir, captions, paths, tuned=True),
    }
    shown = range(len(rows) // (2 * ROWS), len(rows), len(rows) // ROWS)
    items = [(captions[i], paths[i], {name: r[i] for name, r in ranks.items()}) for i in shown]
    draw(items, ranks).save(args.output)


def text_ranks(workdir: Path, captions: list[str], paths: list[Path], *, tuned: bool) -> np.ndarray:
    """The rank of each caption's own clip among all, from 1."""
    prompts = workdir / "prompts.safetensors" if tuned else None
    retriever = vop_jax.load(workdir / "clip.safetensors", prompts)
    retriever.frames = FRAMES
    videos = retriever.embed_videos(paths)
    return rank_pairs(retriever.embed_text(captions), videos, np.arange(len(paths))).t2v


def draw(
    items: list[tuple[str, Path, dict[str, float]]], ranks: dict[str, np.ndarray]
) -> Image.Image:
    """One strip of frames a clip, with its caption and ranks."""
    width = LEFT + FRAMES * (TILE + GAP) + 330
    height = 64 + len(items) * (TILE + 16)
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    count = len(next(iter(ranks.values())))
    pen.text((LEFT, 14), f"{count} held-out clips, one caption each", fill=INK, font=font)
    pen.text((LEFT, 36), "where a caption ranks its own clip", fill=SOFT, font=small)
    for row, (caption, path, own) in enumerate(items):
        top = 64 + row * (TILE + 16)
        for column, pixels in enumerate(read_frames(path, FRAMES).pixels):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            picture.paste(tile, (LEFT + column * (TILE + GAP), top))
        x = LEFT + FRAMES * (TILE + GAP) + 8
        pen.text((x, top + 8), f"“{caption}”", fill=INK, font=small)
        text = "   ".join(f"rank with {name}: {rank:g}" for name, rank in own.items())
        pen.text((x, top + 32), text, fill=SOFT, font=small)
    return picture


if __name__ == "__main__":
    main()
