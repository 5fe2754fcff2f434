"""Trained prompts over a CLIP: texts, pictures and videos become unit vectors."""

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from vop_jax.clip.weights import ClipFile, check_shapes, parameter_shapes
from vop_jax.config.keys import DataSection
from vop_jax.errors import UserError, VideoError
from vop_jax.inference.backbone import Backbone
from vop_jax.storage.tensors import flatten
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompt_set import VIDEO_KEYS, check_same_clip, interpolate_frames, load_prompts

if TYPE_CHECKING:
    from vop_jax.video.frames import Frames
    from vop_jax.video.moments import FrameSpec

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
        trained: dict[str, Any],
        video: dict[str, Any],
        fingerprint: str,
    ):
        self.clip_name, self.clip_fingerprint = backbone.name, backbone.fingerprint
        self.prompts_fingerprint, self.method = fingerprint, method
        self.frames, self.embed_dim = video["frames"], backbone.config.embed_dim
        self._backbone, self._video = backbone, video
        self._trained = backbone.place(trained)
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
        self._backbone.tower("text")  # is read while the texts become tokens
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
        from vop_jax.video.crops import eval_crop  # late: a text needs no PIL

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
        from vop_jax.video.workers import in_threads

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

    def sample(self, path: Path, start: float | None = None, end: float | None = None) -> "Frames":
        """The F frames of a file, or of a segment of it in seconds, sampled as in training.

        Raises:
            VideoError: the file cannot be read.
        """
        from vop_jax.video.frames import Frames, read_frames  # late: a text needs no PyAV
        from vop_jax.video.sampling import sample_indices

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
    def frame_spec(self) -> "FrameSpec":
        """How `sample` and `embed_frames` read and crop, for decoding processes without jax."""
        from vop_jax.video.moments import FrameSpec

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
        return self._backbone.run(encoder, self.method, self._trained, rows)


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
        clip: a CLIP file that the converter, `python -m vop_jax.convert`, wrote, or its name on
            the Hugging Face Hub, hf://OWNER/NAME[@REV][/FILE].
        prompts: prompts.safetensors of a run, or its name; None: plain CLIP.
        frames: F, if it differs from training; tables of frame positions are resampled to it.
        dtype: of matrix products, float32, bfloat16, or auto: the faster one on this device;
            the vectors are float32.
        devices: number of devices that share a batch; by default all local ones.

    Raises:
        UserError: a file is missing or damaged, or the prompts were trained over another CLIP.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    return _with_prompts(Backbone(ClipFile(clip), dtype, devices), prompts, frames)


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
    clip = {f"clip/{name}": shape for name, shape in parameter_shapes(backbone.config).items()}
    check_shapes(prompts or "clip", {**clip, **flatten(trained)}, backbone.shapes(method))
    return Retriever(backbone, method, trained, video, fingerprint)
