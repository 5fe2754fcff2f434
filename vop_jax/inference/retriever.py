"""Trained prompts over a CLIP: texts, pictures and videos become unit vectors."""

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vop_jax.clip.kernels import products
from vop_jax.clip.weights import ClipWeights, cast_frozen, check_shapes, load_clip
from vop_jax.config.keys import DataSection
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError, VideoError
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.training import sharding
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompt_set import VIDEO_KEYS, check_same_clip, interpolate_frames, load_prompts
from vop_jax.video.crops import eval_crop
from vop_jax.video.frames import Frames, read_frames
from vop_jax.video.moments import FrameSpec
from vop_jax.video.sampling import sample_indices
from vop_jax.video.workers import in_threads

# A batch is padded to one of these numbers of rows, rounded up to a multiple of the devices; larger
# batches are split. So few programs serve all sizes: one is compiled for each size that occurs.
BATCH_SIZES = {
    "encode_text": (1, 4, 16, 64, 256),
    "encode_video": (1, 4, 16),
    "encode_frames": (1, 4, 16),
}


class Backbone:
    """A CLIP on the devices and its compiled programs, shared by all prompts over it; thread-safe.

    Attributes:
        name, fingerprint, config: of the CLIP.
        dtype: of the weights and of matrix products, "auto" resolved.
    """

    def __init__(self, weights: ClipWeights, dtype: str = "float32", devices: int | None = None):
        self.name, self.fingerprint, self.config = weights.name, weights.fingerprint, weights.config
        local = jax.local_devices()
        if devices is not None and not 0 < devices <= len(local):
            raise UserError(f"devices={devices}: must be 1 to {len(local)}")
        self.dtype = jnp.dtype(products.fastest_dtype(local[0]) if dtype == "auto" else dtype)
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
        """{name: shape} of all parameters of a method's model."""
        with self._lock:
            if method not in self._shapes:
                shapes = self.model(method).shapes()
                self._shapes[method] = {name: leaf.shape for name, leaf in shapes.items()}
            return self._shapes[method]

    def tokenizer(self, method: MethodConfig) -> CaptionTokenizer:
        """The tokenizer for a method's number of text slots."""
        slots = method.text_slots(self.config)
        with self._lock:
            if slots not in self._tokenizers:
                self._tokenizers[slots] = CaptionTokenizer(slots, self.config.vocab_size)
            return self._tokenizers[slots]

    def with_trained(self, trained: tensors.Tree) -> dict[str, Any]:
        """All parameters of a model, on the devices: trained ones and the rest of the CLIP."""
        placed = sharding.place(self._mesh, dict(trained))
        return tensors.unflatten({**self._flat, **tensors.flatten(placed)})

    def run(self, encoder: str, method: MethodConfig, params: Any, rows: np.ndarray) -> np.ndarray:
        """Encodes rows [N, ...] to float32 [N, ...].

        Args:
            encoder: a function of the model, one of `BATCH_SIZES`.
            method, params: of the model, see `with_trained`.
            rows: at least one.
        """
        limit = self._round_up(BATCH_SIZES[encoder][-1])
        parts = [rows[i : i + limit] for i in range(0, len(rows), limit)]
        # All parts are started before the first is copied back.
        outputs = [self._start(encoder, method, params, part) for part in parts]
        vectors = [np.asarray(out)[: len(part)] for out, part in zip(outputs, parts, strict=True)]
        return np.concatenate(vectors)

    def _start(self, encoder: str, method: MethodConfig, params: Any, rows: np.ndarray) -> Any:
        size = next(n for n in map(self._round_up, BATCH_SIZES[encoder]) if n >= len(rows))
        rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        placed = jax.device_put(rows, sharding.batch_sharding(self._mesh))
        return self._program(encoder, method, params, placed)(params, placed)

    def _round_up(self, size: int) -> int:
        """To a multiple of the devices."""
        devices = self._mesh.size
        return -(-size // devices) * devices

    def _program(self, encoder: str, method: MethodConfig, params: Any, rows: jax.Array) -> Any:
        """The compiled program of a method for a number of rows."""
        key = encoder, method, rows.shape
        with self._lock:  # threads that need one program compile it once
            if key not in self._programs:
                model = self.model(method)

                def encode(params, rows):
                    return model.apply({"params": params}, rows, method=encoder)

                replicated = sharding.replicated(self._mesh)
                lowered = jax.jit(encode, out_shardings=replicated).lower(params, rows)
                self._programs[key] = lowered.compile()
            return self._programs[key]


# How video files are read without prompts; prompts say how training read them.
DEFAULT_VIDEO: dict[str, Any] = {key: getattr(DataSection, key) for key in VIDEO_KEYS}

DTYPES = ("auto", "float32", "bfloat16")
Path = str | os.PathLike


class Retriever:
    """A CLIP with one set of prompts; made by `load`. Threads may share it.

    Attributes:
        clip_name: of the CLIP, to show to people.
        clip_fingerprint: hash of its parameters.
        prompts_fingerprint: hash of the prompts; "" without prompts.
        method: of the prompts.
        frames: F, the number of frames that represent a video.
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
        """A retriever with other prompts over the same CLIP, which stays in memory once.

        Prompts of one method and size also share the compiled programs. Arguments and errors are
        those of `load`.
        """
        return _with_prompts(self._backbone, prompts, frames)

    def compile(self) -> None:
        """Compiles the programs for one text, one video and the frames of one video."""
        size = self._backbone.config.image_size
        clip = np.zeros((1, self.frames, size, size, 3), np.uint8)
        self.embed_text([""])
        self.embed_frames(clip)
        self.embed_each_frame(clip)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Captions or queries -> float32 [N, E], unit rows.

        A text longer than the text slots is truncated before its EOT, which logs a warning.
        """
        ids, truncated = self._ids(texts)
        if truncated.any():
            logging.warning(
                "%d of %d texts truncated to %d tokens", truncated.sum(), len(ids), ids.shape[1]
            )
        return self._run("encode_text", ids)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """The number of texts that are longer than the text slots."""
        return int(self._ids(texts)[1].sum())

    def _ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(texts, str):
            raise TypeError("texts is a list of strings, not one string")
        return self._tokenize.with_truncation(texts)

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Sampled frames uint8 [B, F, H, W, 3] RGB -> float32 [B, E], unit rows.

        Each frame is resized (bicubic, short side) and centre-cropped as for CLIP.
        """
        return self._run("encode_video", self._crop(frames))

    def embed_each_frame(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [B, F, H, W, 3] -> each frame in the context of its video, float32 [B, F, E]."""
        cropped = self._crop(frames)
        if not len(cropped):
            return np.zeros((*cropped.shape[:2], self.embed_dim), np.float32)
        return self._run("encode_frames", cropped)

    def _crop(self, frames: np.ndarray) -> np.ndarray:
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
        """Pictures uint8 [H, W, 3] RGB, any sizes -> float32 [N, E], as videos that stand still."""
        clips = [self._crop(np.asarray(image)[None, None]) for image in images]
        if not clips:
            return self._run("encode_video", np.zeros(0))
        return self._run("encode_video", np.concatenate(clips).repeat(self.frames, axis=1))

    def embed_videos(self, paths: Sequence[Path]) -> np.ndarray:
        """Video files -> float32 [B, E], unit rows; frames are sampled as in training.

        Raises:
            UserError: a file cannot be read.
        """
        if isinstance(paths, str | os.PathLike):
            raise TypeError("paths is a list of files, not one file")

        def read(path: Path) -> np.ndarray:
            return self._crop(np.stack(self.sample(path).pixels)[None])

        rows, clips = [self._run("encode_video", np.zeros(0))], []
        read_ahead = in_threads(read, paths, os.cpu_count() or 1)
        for path, clip in zip(paths, read_ahead, strict=True):
            if isinstance(clip, VideoError):
                raise UserError(f"{os.fspath(path)}: {clip}") from None
            clips.append(clip)
            if len(clips) == 16:  # bounds the memory
                rows.append(self._run("encode_video", np.concatenate(clips)))
                clips = []
        if clips:
            rows.append(self._run("encode_video", np.concatenate(clips)))
        return np.concatenate(rows)

    def sample(self, path: Path, start: float | None = None, end: float | None = None) -> Frames:
        """The F frames of a file, or of a segment of it in seconds, sampled as in training.

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
        # With stored_fps the stored frames are more than F, and training samples F of them.
        rows = sample_indices(len(clip.pixels), self.frames, sampling)
        parts = (clip.pixels, clip.indices, clip.timestamps)
        pixels, indices, timestamps = ([part[i] for i in rows] for part in parts)
        return Frames(pixels, indices, timestamps, clip.count)

    @property
    def dtype(self) -> str:
        """Of matrix products."""
        return self._backbone.dtype.name

    @property
    def frame_spec(self) -> FrameSpec:
        """How `sample` and `embed_frames` read and crop, for decoding processes without jax."""
        return FrameSpec(
            self.frames,
            self._backbone.config.image_size,
            self._video["short_side"],
            self._video["sampling"],
            self._video["stored_fps"],
        )

    def _run(self, encoder: str, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.embed_dim), np.float32)
        return self._backbone.run(encoder, self.method, self._params, rows)


def load(
    clip: Path,
    prompts: Path | None = None,
    *,
    frames: int | None = None,
    dtype: str = "float32",
    devices: int | None = None,
) -> Retriever:
    """Opens a converted CLIP and prompts over it.

    Args:
        clip: a CLIP file that the converter, `python -m vop_jax.convert`, wrote.
        prompts: prompts.safetensors of a run; None: plain CLIP.
        frames: F, if it differs from training; tables of frame positions are resampled to it.
        dtype: of matrix products, float32, bfloat16, or auto: the faster one on this device;
            the vectors are float32.
        devices: number of devices that share a batch; by default all local ones.

    Raises:
        UserError: a file is missing or damaged, or the prompts were trained over another CLIP.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    return _with_prompts(Backbone(load_clip(clip), dtype, devices), prompts, frames)


def _with_prompts(backbone: Backbone, prompts: Path | None, frames: int | None) -> Retriever:
    if frames is not None and frames < 1:
        raise UserError(f"frames={frames}: must be 1 or more")
    method, video, fingerprint = MethodConfig("zero_shot"), DEFAULT_VIDEO, ""
    trained: dict[str, Any] = {}
    if prompts is not None:
        loaded = load_prompts(prompts)
        check_same_clip(prompts, loaded, backbone.fingerprint, backbone.name, backbone.config)
        loaded.method.check_fits(backbone.config)
        method, video = loaded.method, {**DEFAULT_VIDEO, **loaded.video}
        trained, fingerprint = loaded.params, loaded.fingerprint
        if frames is not None:
            trained = interpolate_frames(trained, frames)
    if frames is not None:
        method, video = dataclasses.replace(method, frames=frames), {**video, "frames": frames}
    params = backbone.with_trained(trained)
    check_shapes(prompts or "clip", params, backbone.shapes(method))
    return Retriever(backbone, method, params, video, fingerprint)
