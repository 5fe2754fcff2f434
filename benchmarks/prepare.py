"""How fast videos become records: clips a second per core, next to a plain OpenCV loop.

    python -m benchmarks.prepare --clips=48 --workers=1

Clips of 10 s, 320 x 240, H.264 at 25 frames a second with a key frame at most every 250, of
moving texture and noise; 12 frames each. OpenCV (pip install opencv-python-headless) reads every
frame, keeps the same twelve and compresses them as JPEG: what one would write by hand. Both are
measured in one run, in turns; without OpenCV its row is missing.
"""

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import av
import numpy as np

from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Encoded, Preprocessing, encode_clip
from vop_jax.video.sampling import sample_indices
from vop_jax.video.workers import in_processes

SECONDS, RATE, WIDTH, HEIGHT = 10, 25, 320, 240
PREPROCESSING = Preprocessing()


def make_clip(path: str, seed: int) -> None:
    """A texture that drifts, with some noise."""
    rng = np.random.default_rng(seed)
    large = rng.integers(0, 256, (HEIGHT // 8 + 40, WIDTH // 8 + 40, 3), np.uint8)
    large = np.kron(large, np.ones((8, 8, 1), np.uint8))
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 400_000
        for i in range(SECONDS * RATE):
            view = large[i : i + HEIGHT, i : i + WIDTH].astype(int)
            noisy = view + rng.integers(-6, 7, view.shape)
            frame = av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def ours(paths: list[str], workers: int) -> None:
    """As vop_jax.data.prepare does, without writing the records."""
    clips = [VideoClip(path, path, ("",)) for path in paths]
    encode = functools.partial(encode_clip, preprocessing=PREPROCESSING)
    with contextlib.closing(in_processes(encode, clips, workers, seconds=300)) as results:
        assert all(isinstance(result, Encoded) for result in results)


def with_opencv(paths: list[str], workers: int) -> None:
    """One thread."""
    import cv2

    cv2.setNumThreads(1)
    for path in paths:
        video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        frames = []
        while True:
            there, frame = video.read()
            if not there:
                break
            frames.append(frame)
        for index in sample_indices(len(frames), PREPROCESSING.frames):
            quality = [cv2.IMWRITE_JPEG_QUALITY, PREPROCESSING.jpeg_quality]
            cv2.imencode(".jpg", frames[index], quality)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--workers", type=int, default=1, help="of ours; OpenCV's loop has one")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{i}.mp4") for i in range(args.clips)]
        for i, path in enumerate(paths):
            make_clip(path, i)
        runs: dict[str, Callable[[list[str], int], None]] = {
            f"ours, {args.workers} processes": ours
        }
        with contextlib.suppress(ImportError):
            import cv2  # noqa: F401

            runs["OpenCV loop"] = with_opencv
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                run(paths, args.workers)
                workers = args.workers if run is ours else 1
                rates[name].append(args.clips / (time.perf_counter() - begin) / workers)
        size = sum(os.path.getsize(path) for path in paths) / args.clips / 1e6
        print(
            f"{args.clips} clips of {size:.2f} MB, {args.rounds} rounds, processes' start included"
        )
        print("| | clips/s per core, median | least | most |\n|---|---:|---:|---:|")
        for name, found in rates.items():
            print(
                f"| {name} | {statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f} |"
            )


if __name__ == "__main__":
    main()
