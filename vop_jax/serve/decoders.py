"""What is decoded in processes of their own, see `Sandbox`; jax is never imported here."""

import io

import numpy as np
from PIL import Image

from vop_jax.errors import VideoError
from vop_jax.search.catalog import IndexedFile
from vop_jax.serve.media import open_indexed, path_of
from vop_jax.video.crops import eval_crop
from vop_jax.video.decode import SegmentReader
from vop_jax.video.frames import read_frame_at
from vop_jax.video.images import decode_picture
from vop_jax.video.moments import FrameSpec, read_segment

WIDTH, HEIGHT = 320, 640  # that a thumbnail fits in
QUALITY = 80
PIXELS = 50_000_000  # of an uploaded picture


def thumbnail(folder: str, file: IndexedFile, seconds: float) -> bytes:
    """JPEG of the frame that an indexed video shows at a time.

    Raises:
        Gone: see `open_indexed`.
        VideoError: the file cannot be read.
    """
    with open_indexed(folder, file) as opened:
        picture = Image.fromarray(read_frame_at(path_of(opened), seconds))
    picture.thumbnail((WIDTH, HEIGHT))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def moment(
    folder: str, file: IndexedFile, spec: FrameSpec, start: float, end: float
) -> tuple[np.ndarray, list[float]]:
    """(uint8 [F, S, S, 3], seconds) of the frames of a segment of an indexed video.

    Raises:
        Gone: see `open_indexed`.
        VideoError: the file cannot be read.
    """
    with open_indexed(folder, file) as opened:
        return read_segment(path_of(opened), spec, start, end)


def uploaded_video(path: str, spec: FrameSpec, most: float) -> np.ndarray:
    """uint8 [F, S, S, 3] of a file from anyone.

    Raises:
        VideoError: it is no video, damaged, or longer than `most` seconds.
    """
    times = SegmentReader(path).packet_times()
    if times and times[-1] > most:
        raise VideoError(f"{times[-1]:.0f} s long; at most {most:g} s are taken")
    return read_segment(path, spec)[0]


def uploaded_image(path: str, spec: FrameSpec) -> np.ndarray:
    """uint8 [S, S, 3] of a picture from anyone.

    Raises:
        VideoError: it is no picture, or too large.
    """
    with open(path, "rb") as file:
        pixels = decode_picture(file, PIXELS)
    return eval_crop(pixels[None], spec.image_size)[0]
