"""What finding shots costs, in seconds of a core, beside the decoding that an index needs anyway.

    python -m benchmarks.shots [FILM ...]

Without a film it makes one of ten minutes: textures that drift, in shots of 2 to 8 seconds. `known`
decodes a frame of each shot as an index of windows would, `found` also finds the shots. More frames
of a shot would take the same time more in both.
"""

import argparse
import os
import tempfile
import time

import av
import numpy as np

from vop_jax.video.decode import SegmentReader
from vop_jax.video.moments import FrameSpec, decode_task, inspect_video, plan_tasks
from vop_jax.video.shots import ShotTask, decode_shots, plan_shots

SPEC = FrameSpec(frames=1, image_size=224)
RATE, WIDTH, HEIGHT = 25, 640, 360
MINUTES = 10


def make_film(path: str) -> None:
    """A minute of shots, ten times: the packets are written again, which is quick."""
    rng = np.random.default_rng(0)
    packets: list[bytes] = []
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        encoded, left = [], 0
        for _ in range(60 * RATE):
            if not left:
                left = int(rng.integers(2 * RATE, 8 * RATE))
                coarse = rng.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3), np.uint8)
                texture = np.kron(coarse, np.ones((40, 40, 1), np.uint8))
            left -= 1
            view = texture[left : left + HEIGHT, left : left + WIDTH].astype(int)
            noisy = (view + rng.integers(-4, 5, view.shape)).clip(0, 255).astype(np.uint8)
            encoded += stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24"))
        encoded += stream.encode(None)
        stamps = [(packet.pts or 0, packet.dts or 0, packet.is_keyframe) for packet in encoded]
        packets = [bytes(packet) for packet in encoded]
        tick = encoded[0].time_base
        assert tick is not None
        minute = round(60 / tick)
        for turn in range(MINUTES):
            for data, (pts, dts, is_keyframe) in zip(packets, stamps, strict=True):
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = stream, tick, is_keyframe
                packet.pts, packet.dts = pts + turn * minute, dts + turn * minute
                container.mux(packet)


def measure(path: str, repeats: int) -> None:
    info = inspect_video(path, SPEC)
    tasks = plan_shots(path, info, SPEC)
    shots = [
        shot for task in tasks if isinstance(task, ShotTask) for shot in decode_shots(task).shots
    ]

    def decode() -> None:
        SegmentReader(path).decode([])

    def known() -> None:
        for task in plan_tasks(path, info, shots, SPEC):
            decode_task(task)

    def found() -> None:
        for task in tasks:
            if isinstance(task, ShotTask):
                decode_shots(task)
            else:
                decode_task(task)

    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):  # in turns: the machine may do other work
        for call in (decode, known, found):
            begin = time.process_time()
            call()
            seconds.setdefault(call.__name__, []).append(time.process_time() - begin)
    best = {name: min(times) for name, times in seconds.items()}
    columns = "  ".join(f"{name} {value:.1f} s" for name, value in best.items())
    extra = (best["found"] - best["known"]) / best["decode"]
    name = os.path.basename(path)
    print(
        f"{name}: {info.duration:.0f} s, {len(shots)} shots  {columns}  finding/decode {extra:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("films", nargs="*", metavar="FILM")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        films = args.films
        if not films:
            films = [os.path.join(folder, "film.mp4")]
            make_film(films[0])
        for film in films:
            measure(film, args.repeats)


if __name__ == "__main__":
    main()
