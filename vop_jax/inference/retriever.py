"""What a user holds after training: text and video in, unit vectors out."""

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vop_jax.clip.weights import ClipWeights, cast_frozen, check_shapes, load_clip
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError, VideoError
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.training import sharding
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompt_set import check_same_clip, interpolate_frames, load_prompts
from vop_jax.video.crops import eval_crop
from vop_jax.video.frames import Frames, read_frames
from vop_jax.video.moments import FrameSpec
from vop_jax.video.sampling import sample_indices
from vop_jax.video.workers import in_threads

# Rows of a batch are filled up to one of these, or to its next multiple of the devices: a program
# is compiled for each that comes up. Larger batches are cut.
SIZES = {
    "encode_text": (1, 4, 16, 64, 256),
    "encode_video": (1, 4, 16),
    "encode_frames": (1, 4, 16),
}


class Backbone:
    """A CLIP whose weights are on the devices once; thread-safe.

    Attributes:
        name, fingerprint, config: of the CLIP.
        dtype: of matmuls; the weights are cast to it.
    """

    def __init__(self, weights: ClipWeights, dtype: str = "float32", devices: int | None = None):
        self.name, self.fingerprint, self.config = weights.name, weights.fingerprint, weights.config
        self.dtype = jnp.dtype(dtype)
        local = jax.local_devices()
        if devices is not None and not 0 < devices <= len(local):
            raise UserError(f"devices={devices}: available: {len(local)}")
        self._mesh = sharding.make_mesh(devices=local[:devices])
        params = cast_frozen({"clip": weights.params}, self.dtype)
        self._flat = tensors.flatten(sharding.place(self._mesh, params))
        self._lock = threading.Lock()
        self._shapes: dict[MethodConfig, dict[str, tuple[int, ...]]] = {}
        self._tokenizers: dict[int, CaptionTokenizer] = {}
        self._programs: dict[tuple, Callable] = {}

    def model(self, method: MethodConfig) -> TextVideoModel:
        """The model of a method over this CLIP; equal for equal methods."""
        return TextVideoModel(self.config, method, self.dtype)

    def shapes(self, method: MethodConfig) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all parameters of the method's model."""
        with self._lock:
            if method not in self._shapes:
                shapes = self.model(method).shapes()
                self._shapes[method] = {name: leaf.shape for name, leaf in shapes.items()}
            return self._shapes[method]

    def tokenizer(self, method: MethodConfig) -> CaptionTokenizer:
        """Of the method's token slots."""
        slots = method.text_slots(self.config)
        with self._lock:
            if slots not in self._tokenizers:
                self._tokenizers[slots] = CaptionTokenizer(slots, self.config.vocab_size)
            return self._tokenizers[slots]

    def with_trained(self, trained: tensors.Tree) -> dict[str, Any]:
        """All parameters, on the devices: these, and what they leave of the shared CLIP."""
        placed = sharding.place(self._mesh, dict(trained))
        return tensors.unflatten({**self._flat, **tensors.flatten(placed)})

    def run(self, what: str, method: MethodConfig, params: Any, rows: np.ndarray) -> np.ndarray:
        """What a method of the model makes of rows [N, ...], float32 [N, ...].

        Args:
            what: one of `SIZES`.
            method, params: of the model, see `with_trained`.
            rows: at least one.
        """
        limit = self._whole(SIZES[what][-1])
        parts = [rows[i : i + limit] for i in range(0, len(rows), limit)]
        # All are started before the first is waited for.
        started = [self._start(what, method, params, part) for part in parts]
        done = [np.asarray(out)[: len(part)] for out, part in zip(started, parts, strict=True)]
        return np.concatenate(done)

    def _start(self, what: str, method: MethodConfig, params: Any, rows: np.ndarray) -> jax.Array:
        size = next(n for n in map(self._whole, SIZES[what]) if n >= len(rows))
        rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        placed = jax.device_put(rows, sharding.batch_sharding(self._mesh))
        return self._program(what, method, params, placed)(params, placed)

    def _whole(self, size: int) -> int:
        devices = self._mesh.size
        return -(-size // devices) * devices

    def _program(self, what: str, method: MethodConfig, params: Any, rows: jax.Array) -> Callable:
        """Compiled once for each method and number of rows, whoever asks first."""
        key = what, method, rows.shape
        with self._lock:
            if key not in self._programs:
                model = self.model(method)

                def encode(params, rows):
                    return model.apply({"params": params}, rows, method=what)

                whole = sharding.replicated(self._mesh)
                lowered = jax.jit(encode, out_shardings=whole).lower(params, rows)
                self._programs[key] = lowered.compile()
            return self._programs[key]


# How clips are read when no prompts say how they were read in training.
DEFAULT_VIDEO: dict[str, Any] = {
    "frames": 12,
    "short_side": 256,
    "sampling": "uniform",
    "stored_fps": 0.0,
    "folder_fps": 0.0,
}

DTYPES = ("float32", "bfloat16")
Path = str | os.PathLike


class Retriever:
    """A CLIP with one set of prompts; made by `load`. Threads may share it.

    Attributes:
        clip_name: the CLIP, for people to read.
        clip_fingerprint: of its parameters.
        prompts_fingerprint: equal exactly when the vectors over one CLIP are; "" without prompts.
        method: what the prompts are.
        frames: F, frames sampled of a video file.
        embed_dim: E.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: MethodConfig,
        params: dict[str, Any],
        video: dict[str, Any],
        fingerprint: str,
    ):
        self.clip_name, self.clip_fingerprint = backbone.name, backbone.fingerprint
        self.prompts_fingerprint, self.method = fingerprint, method
        self.frames, self.embed_dim = video["frames"], backbone.config.embed_dim
        self._backbone, self._video = backbone, video
        self._params = params
        self._tokenize = backbone.tokenizer(method)

    def with_prompts(self, prompts: Path | None, *, frames: int | None = None) -> "Retriever":
        """Another set of prompts over the same CLIP: only the prompts take memory of their own.

        Programs are shared too by sets of one method and size. Arguments and errors as `load`.
        """
        return _over(self._backbone, prompts, frames)

    def compile(self) -> None:
        """Compiles now what the first single text, clip and clip of frames would wait for."""
        size = self._backbone.config.image_size
        clip = np.zeros((1, self.frames, size, size, 3), np.uint8)
        self.embed_text([""])
        self.embed_frames(clip)
        self.embed_each_frame(clip)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Captions or queries -> float32 [N, E], unit rows.

        A text longer than the slots is truncated, keeps its EOT, and a warning is logged.
        """
        ids, truncated = self._ids(texts)
        if truncated.any():
            logging.warning(
                "%d of %d texts truncated to %d tokens", truncated.sum(), len(ids), ids.shape[1]
            )
        return self._run("encode_text", ids)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the slots."""
        return int(self._ids(texts)[1].sum())

    def _ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(texts, str):
            raise TypeError("texts is a list of strings, not one string")
        return self._tokenize.with_truncation(texts)

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Sampled frames uint8 [B, F, H, W, 3] RGB -> float32 [B, E], unit rows.

        Each frame is resized (bicubic, short side) and centre-cropped as CLIP does.
        """
        return self._run("encode_video", self._cropped(frames))

    def embed_each_frame(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [B, F, H, W, 3] -> each frame within its clip, float32 [B, F, E], unit rows."""
        cropped = self._cropped(frames)
        if not len(cropped):
            return np.zeros((*cropped.shape[:2], self.embed_dim), np.float32)
        return self._run("encode_frames", cropped)

    def _cropped(self, frames: np.ndarray) -> np.ndarray:
        """[B, F, H, W, 3] -> [B, F, S, S, 3]."""
        frames = np.asarray(frames)
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"frames are uint8 [B, F, H, W, 3], not {frames.dtype} {list(frames.shape)}"
            )
        if not all(frames.shape[1:]):
            raise ValueError(f"clips without frames or pixels: {list(frames.shape)}")
        size = self._backbone.config.image_size
        clips = [eval_crop(clip, size) for clip in frames]
        return np.stack(clips) if clips else np.zeros((0, frames.shape[1], size, size, 3), np.uint8)

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures uint8 [H, W, 3] RGB, of any sizes -> float32 [N, E]; as still clips."""
        clips = [self._cropped(np.asarray(image)[None, None]) for image in images]
        if not clips:
            return self._run("encode_video", np.zeros(0))
        return self._run("encode_video", np.concatenate(clips).repeat(self.frames, axis=1))

    def embed_videos(self, paths: Sequence[Path]) -> np.ndarray:
        """Video files -> float32 [B, E], unit rows; sampled as in training.

        Raises:
            UserError: a file that cannot be read, with the reason.
        """
        if isinstance(paths, str | os.PathLike):
            raise TypeError("paths is a list of files, not one file")

        def read(path: Path) -> np.ndarray:
            return self._cropped(np.stack(self.sample(path).pixels)[None])

        rows, clips = [self._run("encode_video", np.zeros(0))], []
        read_ahead = in_threads(read, paths, os.cpu_count() or 1)
        for path, clip in zip(paths, read_ahead, strict=True):
            if isinstance(clip, VideoError):
                raise UserError(f"{os.fspath(path)}: {clip}") from None
            clips.append(clip)
            if len(clips) == 16:  # so that memory does not grow with the number of files
                rows.append(self._run("encode_video", np.concatenate(clips)))
                clips = []
        if clips:
            rows.append(self._run("encode_video", np.concatenate(clips)))
        return np.concatenate(rows)

    def sample(self, path: Path, start: float | None = None, end: float | None = None) -> Frames:
        """The F frames of a file, or of a stretch of it in seconds, as in training.

        Raises:
            VideoError: the file cannot be read.
        """
        video, sampling = self._video, self._video["sampling"]
        clip = read_frames(
            path,
            self.frames,
            start=start,
            end=end,
            short_side=video["short_side"],
            sampling=sampling,
            fps=video["stored_fps"],
            folder_fps=video["folder_fps"],
        )
        if len(clip.pixels) == self.frames:
            return clip
        # With stored_fps these are more, of which training takes F.
        taken = sample_indices(len(clip.pixels), self.frames, sampling)
        parts = (clip.pixels, clip.indices, clip.timestamps)
        pixels, indices, timestamps = ([part[i] for i in taken] for part in parts)
        return Frames(pixels, indices, timestamps, clip.count)

    @property
    def frame_spec(self) -> FrameSpec:
        """How `sample` reads and `embed_frames` crops, for processes that have no jax."""
        return FrameSpec(
            self.frames,
            self._backbone.config.image_size,
            self._video["short_side"],
            self._video["sampling"],
            self._video["stored_fps"],
        )

    def _run(self, what: str, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.embed_dim), np.float32)
        return self._backbone.run(what, self.method, self._params, rows)


def load(
    clip: Path,
    prompts: Path | None = None,
    *,
    frames: int | None = None,
    dtype: str = "float32",
    devices: int | None = None,
) -> Retriever:
    """Opens a converted CLIP and, over it, a set of prompts.

    Args:
        clip: file written by tools/convert_clip_weights.py.
        prompts: prompts.safetensors of a run; None is plain CLIP.
        frames: F, where it shall not be the prompts' own: what they know of frame positions is
            resampled to as many, and videos are sampled so.
        dtype: of matmuls, float32 or bfloat16; the vectors are float32.
        devices: how many the rows of a batch are spread over; all if not said.

    Raises:
        UserError: a file is missing or not what it should be, or the prompts were trained over
            another CLIP (the message names both).
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    return _over(Backbone(load_clip(clip), dtype, devices), prompts, frames)


def _over(backbone: Backbone, prompts: Path | None, frames: int | None) -> Retriever:
    if frames is not None and frames < 1:
        raise UserError(f"frames={frames}: must be 1 or more")
    method, video, fingerprint = MethodConfig("zero_shot"), DEFAULT_VIDEO, ""
    trained: dict[str, Any] = {}
    if prompts is not None:
        given = load_prompts(prompts)
        check_same_clip(prompts, given, backbone.fingerprint, backbone.name, backbone.config)
        given.method.check_fits(backbone.config)
        method, video = given.method, {**DEFAULT_VIDEO, **given.video}
        trained, fingerprint = given.params, given.fingerprint
        if frames is not None:
            trained = interpolate_frames(trained, frames)
    if frames is not None:
        method, video = dataclasses.replace(method, frames=frames), {**video, "frames": frames}
    params = backbone.with_trained(trained)
    check_shapes(prompts or "clip", params, backbone.shapes(method))
    return Retriever(backbone, method, params, video, fingerprint)
