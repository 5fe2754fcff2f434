"""Small video files for tests, each frame of a known grey level or number."""

import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def encode(
    path: Path,
    pictures: Iterable[np.ndarray],
    times: list[int] | None = None,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    base: int = 1000,
    rate: int | Fraction = 10,
    options: dict[str, str] | None = None,
    tags: dict[str, int] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A file of uint8 [h, w, 3] pictures, at `rate` a second or at `times` of 1 / base s.

    Args:
        options, container: of the encoder and of the file.
        tags: attributes of the encoder.
    """
    with av.open(str(path), "w", options=container or {}) as file:
        stream = None
        for number, pixels in enumerate(pictures):
            if stream is None:
                stream = file.add_stream(codec, rate=rate, options=options or {})
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = pixel_format
                if times is not None and base != rate:
                    stream.codec_context.time_base = Fraction(1, base)
                for name, value in (tags or {}).items():
                    setattr(stream.codec_context, name, value)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, base)
            file.mux(stream.encode(frame))
        assert stream is not None
        file.mux(stream.encode(None))
    return path


def write(
    path: Path,
    count: int = 24,
    *,
    width: int = 64,
    height: int = 48,
    milliseconds: list[int] | None = None,
    options: dict[str, str] | None = None,
    **settings: Any,
) -> Path:
    """A file of `count` plain frames; the left half is brighter. `options` are the file's."""
    levels = np.linspace(20, 235, count).round().astype(np.uint8)  # far enough apart for any codec
    pictures = np.repeat(levels, height * width * 3)
    pictures = pictures.reshape(count, height, width, 3)
    left = pictures[:, :, : width // 2]
    left[:] = np.minimum(left.astype(int) + 20, 255)
    return encode(path, pictures, milliseconds, container=options, **settings)


def level_of(pixels: np.ndarray) -> float:
    """The grey level of the darker, right half of a frame."""
    return float(pixels[:, pixels.shape[1] * 5 // 8 :].mean())


def write_numbered(
    path: Path, times: list[int], *, size: tuple[int, int] = (64, 32), **settings: Any
) -> Path:
    """A file whose frames show their numbers, see `number_of`, at `times` of 1 / base s."""
    bits = (np.arange(len(times))[:, None] >> np.arange(8) & 1).astype(np.uint8) * 255
    rows = bits.repeat(size[0] // 8, axis=1)[:, None, :, None]
    return encode(path, np.broadcast_to(rows, (len(times), size[1], size[0], 3)), times, **settings)


def number_of(pixels: np.ndarray) -> int:
    """The number that a frame shows."""
    columns = pixels.reshape(len(pixels), 8, -1).mean(axis=(0, 2))
    return int(((columns > 128) << np.arange(8)).sum())


def write_audio(path: Path, *, cover: bool = False) -> Path:
    """A file with sound and no film; `cover`: with a picture of its record, as music has."""
    with av.open(str(path), "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=16000)
        streams: list[Any] = [sound]
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            streams.append(picture)
        for i in range(40):
            file.mux(sound.encode(silence(i)))
        if cover:
            pixels = np.zeros((48, 64, 3), np.uint8)
            file.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            file.mux(stream.encode(None))
    return path


def silence(number: int) -> av.AudioFrame:
    """The frame of this number of a silent track of 16 kHz."""
    samples = np.zeros((1, 1024), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 1024 * number
    return frame


def rotate(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Writes (a, b, c, d), its rotation for display, to the track header of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (number << 16 for number in matrix)  # 16.16 and 2.30 fixed point
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    return path
