"""Small video files for tests, each frame of a known grey level."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def levels(count: int) -> np.ndarray:
    """The grey level of each frame, far enough apart to survive any codec."""
    return np.linspace(20, 235, count).round().astype(int)


def write(
    path: Path,
    count: int = 24,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    width: int = 64,
    height: int = 48,
    milliseconds: list[int] | None = None,
    rate: int = 10,
    options: dict[str, str] | None = None,
) -> Path:
    """A file of `count` plain frames, or any frames at the given times; left half is brighter."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, level in enumerate(levels(count)):
            pixels = np.full((height, width, 3), level, np.uint8)
            pixels[:, : width // 2] = min(level + 20, 255)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_music(path: Path) -> Path:
    """Sound with a picture of its record, as music files have."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000)
        picture = container.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        for i in range(40):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(sound.encode(frame))
        pixels = np.zeros((48, 64, 3), np.uint8)
        container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in (sound, picture):
            container.mux(stream.encode(None))
    return path


def rotate(path: Path) -> Path:
    """Marks an mp4 as filmed upright: to be shown turned by 90 degrees clockwise."""
    data = bytearray(path.read_bytes())
    # The 3 x 3 matrix of the track header, 16.16 and 2.30 fixed point.
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    return path


def level_of(pixels: np.ndarray) -> float:
    """The grey level of the darker, right half of a frame."""
    return float(pixels[:, pixels.shape[1] * 5 // 8 :].mean())
