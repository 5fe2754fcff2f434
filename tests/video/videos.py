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


def write_numbered(
    path: Path,
    times: list[int],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    base: int = 1000,
    rate: int | Fraction = 10,
    size: tuple[int, int] = (64, 32),
    options: dict[str, str] | None = None,
    tags: dict[str, int] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A file whose frames show their numbers, see `number_of`, at `times` of 1 / base s.

    Args:
        options, container: of the encoder and of the file.
        tags: attributes of the encoder.
    """
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        (stream.width, stream.height), stream.pix_fmt = size, pixel_format
        if base != rate:
            stream.codec_context.time_base = Fraction(1, base)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for number, time in enumerate(times):
            bits = (number >> np.arange(8) & 1).repeat(size[0] // 8) * 255
            pixels = np.broadcast_to(bits[None, :, None], (size[1], size[0], 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, base)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def number_of(pixels: np.ndarray) -> int:
    """The number that a frame shows."""
    columns = pixels.reshape(len(pixels), 8, -1).mean(axis=(0, 2))
    return int(((columns > 128) << np.arange(8)).sum())


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Writes (a, b, c, d), by which it is to be shown, to the track header of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (number << 16 for number in matrix)  # 16.16 and 2.30 fixed point
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    return path


def level_of(pixels: np.ndarray) -> float:
    """The grey level of the darker, right half of a frame."""
    return float(pixels[:, pixels.shape[1] * 5 // 8 :].mean())
