"""What a user holds after training: text and video in, unit vectors out."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vop_jax import tensorfile
from vop_jax.clip.weights import check_shapes, load_clip
from vop_jax.data.frames import read_frames
from vop_jax.data.pixels import eval_crop
from vop_jax.data.sampling import sample_indices
from vop_jax.data.sources import CaptionTokenizer
from vop_jax.errors import UserError, VideoError
from vop_jax.model import TextVideoModel
from vop_jax.tuning.frame_tables import interpolate_frames
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompts_file import check_same_clip, load_prompts

# How clips are read when no prompts say how they were read in training.
DEFAULT_VIDEO = {"frames": 12, "short_side": 256, "stored_fps": 0.0}

DTYPES = ("float32", "bfloat16")


class Retriever:
    """A CLIP with one set of prompts; made by `load`.

    Attributes:
        clip_name: the CLIP, for people to read.
        method: what the prompts are.
        frames: F, frames sampled of a video file.
    """

    def __init__(self, model: TextVideoModel, params: dict, clip_name: str, video: dict):
        self.clip_name = clip_name
        self.method = model.method
        self.frames = video["frames"]
        self._image_size = model.clip_config.image_size
        self._embed_dim = model.clip_config.embed_dim
        self._video = video
        self._params = jax.device_put(params)
        self._tokenize = CaptionTokenizer(model.method.text_slots(model.clip_config))

        def jitted(method: str):
            return jax.jit(lambda p, rows: model.apply({"params": p}, rows, method=method))

        self._encode_text = jitted("encode_text")
        self._encode_video = jitted("encode_video")

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Captions or queries -> float32 [N, E], unit rows.

        A text longer than the slots is cut, its EOT kept, and a warning logged.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a list of strings, not one string")
        ids, cut = self._tokenize.with_cuts(texts)
        if cut.any():
            logging.warning("%d of %d texts cut to %d tokens", cut.sum(), len(ids), ids.shape[1])
        return np.asarray(self._encode_text(self._params, ids))

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Sampled frames uint8 [B, F, H, W, 3] RGB -> float32 [B, E], unit rows.

        Each frame is resized (bicubic, short side) and centre-cropped as CLIP does.
        """
        frames = np.asarray(frames)
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"frames are uint8 [B, F, H, W, 3], not {frames.dtype} {list(frames.shape)}"
            )
        if not all(frames.shape[1:]):
            raise ValueError(f"clips without frames or pixels: {list(frames.shape)}")
        if not len(frames):
            return np.zeros((0, self._embed_dim), np.float32)
        cropped = np.stack([eval_crop(clip, self._image_size) for clip in frames])
        return np.asarray(self._encode_video(self._params, cropped))

    def embed_videos(self, paths: Sequence[str | os.PathLike]) -> np.ndarray:
        """Video files -> float32 [B, E], unit rows; sampled as in training.

        Raises:
            UserError: a file that cannot be read, with the reason.
        """
        if isinstance(paths, str | os.PathLike):
            raise TypeError("paths is a list of files, not one file")
        rows = [np.zeros((0, self._embed_dim), np.float32)]
        sampling = self._video.get("sampling", "uniform")
        for path in paths:
            try:
                clip = read_frames(
                    path,
                    self.frames,
                    short_side=self._video["short_side"],
                    sampling=sampling,
                    fps=self._video.get("stored_fps", 0.0),
                    folder_fps=self._video.get("folder_fps", 0.0),
                )
            except VideoError as error:
                raise UserError(f"{os.fspath(path)}: {error}") from None
            # With stored_fps these are more, of which training takes F.
            taken = np.arange(self.frames)
            if len(clip.pixels) != self.frames:
                taken = sample_indices(len(clip.pixels), self.frames, sampling)
            rows.append(self.embed_frames(np.stack([clip.pixels[i] for i in taken])[None]))
        return np.concatenate(rows)


def load(
    clip: str | os.PathLike,
    prompts: str | os.PathLike | None = None,
    *,
    frames: int | None = None,
    dtype: str = "float32",
) -> Retriever:
    """Opens a converted CLIP and, over it, a set of prompts.

    Args:
        clip: file written by tools/convert_clip_weights.py.
        prompts: prompts.safetensors of a run; None is plain CLIP.
        frames: F, where it shall not be the prompts' own: what they know of frame positions is
            resampled to as many, and videos are sampled so.
        dtype: of matmuls, float32 or bfloat16; the vectors are float32.

    Raises:
        UserError: a file is missing or not what it should be, or the prompts were trained over
            another CLIP (the message names both).
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    weights = load_clip(clip)
    params, method, video = {"clip": weights.params}, MethodConfig("zero_shot"), DEFAULT_VIDEO
    if prompts is not None:
        given = load_prompts(prompts)
        check_same_clip(prompts, given, weights.fingerprint, weights.name)
        given.method.check_fits(weights.config)
        method, video = given.method, {**DEFAULT_VIDEO, **given.video}
        trained = given.params
        if frames is not None:
            trained = interpolate_frames(trained, frames)
        flat = {**tensorfile.flatten(params), **tensorfile.flatten(trained)}
        params = tensorfile.unflatten(flat)
    if frames is not None:
        method, video = dataclasses.replace(method, frames=frames), {**video, "frames": frames}
    model = TextVideoModel(weights.config, method, jnp.dtype(dtype))
    shapes = {name: leaf.shape for name, leaf in model.shapes().items()}
    check_shapes(prompts or clip, params, shapes)
    return Retriever(model, params, weights.name, video)
