"""How often the index of a demo's held-out clips finds the clip that a caption was written for.

    python -m vop_jax.main --config=configs/demo.py:vop_c --workdir=DIR
    python -m benchmarks.find_motion --workdir=DIR

Half of the clips are the reversals of the other half, so what does not know frames' order finds the
right one first at most half of the time.
"""

import argparse
import os
import tempfile

import numpy as np

import vop_jax.search
from vop_jax.data.datasets.folder import read_folder
from vop_jax.search.__main__ import main as search

WITHIN = 5


def places(workdir: str, index: str) -> np.ndarray:
    """Of each caption's own clip among the hits, from 1; `WITHIN` + 1 if it is not among them."""
    held_out = read_folder(f"{workdir}/videos/annotations.csv", f"{workdir}/videos")["test"]
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        for clip in held_out:
            os.link(clip.path, os.path.join(folder, os.path.basename(clip.path)))
        model = (f"--clip={workdir}/clip.safetensors", f"--prompts={workdir}/prompts.safetensors")
        if status := search(["index", folder, f"--index={index}", *model]):
            raise SystemExit(status)
        searcher = vop_jax.search.open(index)
        ranks = []
        for clip in held_out:
            own = os.path.basename(clip.path)
            for caption in clip.captions:
                hits = [os.path.basename(hit.path) for hit in searcher.text(caption, WITHIN)]
                ranks.append(hits.index(own) + 1 if own in hits else WITHIN + 1)
    return np.array(ranks)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.find_motion", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a finished run of configs/demo.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as index:
        ranks = places(args.workdir, os.path.join(index, "held_out.index"))
    first, within = 100 * np.mean(ranks == 1), 100 * np.mean(ranks <= WITHIN)
    print(f"{len(ranks)} captions: own clip first {first:.1f} %, within {WITHIN} {within:.1f} %")


if __name__ == "__main__":
    main()
