"""What ranking again by frames gains: recall of captions among held-out clips of the demo.

    python -m vop_jax.main --config=demo --workdir=/tmp/vop_demo
    python -m benchmarks.by_frames /tmp/vop_demo --clips=768 --joined=1,4

The clips are rendered with a seed that training has not seen, and indexed with --keep_frames. With
--joined=4 each file shows four of them one after the other, and a caption is that of a quarter. The
score of a file is the cosine with its vector (`clip`), with its nearest frame (`frame`), or the
mean of the two (`mean`, what --by_frames does).
"""

import argparse
import csv
import os
import tempfile

import av
import numpy as np

from vop_jax.data.datasets import clips
from vop_jax.data.datasets.shapes import SIZE
from vop_jax.search.build import IndexRequest, build_index
from vop_jax.search.searcher import open_searcher

TIMES = 10_000  # samples of the bootstrap


def join(sources: list[str], target: str) -> None:
    """Writes the frames of some files to one."""
    with av.open(target, "w") as container:
        stream = container.add_stream("libx264", rate=clips.RATE, options={"crf": "16"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for source in sources:
            with av.open(source) as film:
                for frame in film.decode(video=0):
                    frame.pts = None
                    container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def measure(workdir: str, count: int, seed: int, joined: int) -> None:
    files = count // joined  # file n shows the clips n, n + files, …
    with tempfile.TemporaryDirectory() as folder:
        videos, films, index = (os.path.join(folder, name) for name in ("videos", "films", "index"))
        os.mkdir(films)
        table = clips.render(videos, seed=seed, train=0, val=0, test=count)
        with open(table, newline="", encoding="utf-8") as file:
            captions = {row["video"]: row["caption"] for row in csv.DictReader(file)}
        paths = [os.path.join(videos, video) for video in captions]
        for number in range(files):
            join(paths[number::files], os.path.join(films, f"{number}.mp4"))
        clip, prompts = (f"{workdir}/{name}.safetensors" for name in ("clip", "prompts"))
        build_index(index, IndexRequest(films, clip, prompts, keep_frames=True))
        searcher = open_searcher(index)
        vectors = searcher.vectors(list(captions.values()))
        scores = {name: np.zeros((count, files), np.float32) for name in ("clip", "mean")}
        for name, by_frames in (("clip", False), ("mean", True)):
            found = searcher.index.search(vectors, files, by_frames=by_frames)
            for row, hits in enumerate(found):
                for hit in hits:
                    scores[name][row, int(hit.path.removesuffix(".mp4"))] = hit.score
    scores["frame"] = 2 * scores["mean"] - scores["clip"]
    right = np.arange(count) % files
    ranks = {
        name: (own > own[np.arange(count), right][:, None]).sum(axis=1)
        for name, own in scores.items()
    }
    draws = np.random.default_rng(0).integers(count, size=(TIMES, count))
    for name in ("clip", "frame", "mean"):
        gains = ((ranks[name] == 0).astype(float) - (ranks["clip"] == 0))[draws].mean(axis=1)
        low, high = 100 * np.quantile(gains, (0.025, 0.975))
        one, five = (100 * (ranks[name] < k).mean() for k in (1, 5))
        print(f"| {joined} | {name} | {one:.1f} | {five:.1f} | {low:+.1f} to {high:+.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", help="of a run of the demo")
    parser.add_argument("--clips", type=int, default=768, help="even, at most 1152")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--joined", default="1,4", help="clips in a file")
    args = parser.parse_args()
    print("| clips in a file | score | R@1 | R@5 | R@1 minus that of `clip`, 95 % |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for joined in map(int, args.joined.split(",")):
        measure(args.workdir, args.clips, args.seed, joined)


if __name__ == "__main__":
    main()
