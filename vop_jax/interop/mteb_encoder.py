"""Trained prompts as a model of MTEB; importing this file needs the extra `mteb`."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import FramesCollator
from mteb.models.model_meta import ModelMeta, ScoringFunction
from tqdm.auto import tqdm

from vop_jax.errors import UserError
from vop_jax.inference.retriever import Retriever
from vop_jax.video.crops import eval_crop, resize_short_side
from vop_jax.video.moments import FrameSpec
from vop_jax.video.sampling import sample_indices, stored_indices


class PromptEncoder(AbsEncoder):
    """A retriever that MTEB evaluates on tasks that pair texts with videos.

    Tasks' instructions, such as "Find the video clip that …", are not given to CLIP.
    """

    def __init__(self, retriever: Retriever):
        self.model = None  # AbsEncoder would ask it for similarities
        self._retriever = retriever
        self.mteb_model_meta = _model_meta(retriever)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any, **options: Any) -> Any:
        """The texts or the videos of one side of a task -> float32 [N, E], unit rows.

        Args:
            inputs: a DataLoader of rows with "text", or with "video", a decoder of torchcodec.

        Raises:
            UserError: this side of the task has sounds or images, or videos with their texts.
        """
        modalities = task_metadata.get_modalities(prompt_type)
        embed: Callable[[Any], np.ndarray]
        if modalities == ["text"]:
            embed, column = self._retriever.embed_text, "text"
        elif modalities == ["video"]:
            embed, column = self._embed_clips, "video"
            inputs.collate_fn = ClipCollator(self._retriever.frame_spec)
        else:
            raise UserError(
                f"task {task_metadata.name}: a side has {' and '.join(modalities)}; must be text "
                "or video alone"
            )
        batches = tqdm(inputs, column, disable=not options.get("show_progress_bar", True))
        return np.concatenate([embed(batch[column]) for batch in batches])

    def _embed_clips(self, clips: list[np.ndarray]) -> np.ndarray:
        return self._retriever.embed_frames(np.stack(clips))


class ClipCollator(FramesCollator):
    """MTEB's collator, with the frames that training samples: videos become uint8 [F, S, S, 3].

    MTEB's own choice of F frames is `linspace(0, n - 1, F)`, rounded.
    """

    def __init__(self, spec: FrameSpec):
        super().__init__()
        self._spec = spec

    def __call__(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows with decoders -> {"video": clips}, decoded in threads."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            clips = pool.map(self.resample_video, [row["video"] for row in inputs])
            return {"video": [*clips]}

    def resample_video(self, video: Any, **options: Any) -> np.ndarray:
        """A decoder of torchcodec -> uint8 [F, S, S, 3]."""
        sampled = super().resample_video(_SampledDecoder(video, self._spec), **options)
        frames = sampled.permute(0, 2, 3, 1).numpy()
        small = [resize_short_side(f, self._spec.short_side, enlarge=False) for f in frames]
        return eval_crop(small, self._spec.image_size)


class _SampledDecoder:
    """A decoder that returns, of the frames it is to decode, those that training would sample.

    So MTEB's own handling of frames that do not decode stays in use.
    """

    def __init__(self, decoder: Any, spec: FrameSpec):
        self.metadata = decoder.metadata
        self._decoder, self._spec = decoder, spec

    def get_frames_at(self, indices: list[int]) -> Any:
        spec = self._spec
        if spec.fps:
            times = [i / self.metadata.average_fps for i in indices]
            indices = stored_indices(times, 0.0, spec.fps, spec.sampling)
        rows = sample_indices(len(indices), spec.frames, spec.sampling)
        return self._decoder.get_frames_at([indices[row] for row in rows])


def _model_meta(retriever: Retriever) -> ModelMeta:
    """What MTEB stores beside results; it takes results of one name and revision for the same."""
    prompts = retriever.prompts_fingerprint[:12] or "no_prompts"
    parts = (retriever.clip_fingerprint[:12], prompts, f"{retriever.frames}x", retriever.dtype)
    return ModelMeta.create_empty(
        {
            "name": f"vop_jax/{retriever.method.name}",
            "revision": "-".join(parts),
            "embed_dim": retriever.embed_dim,
            "framework": ["JAX"],
            "modalities": ["text", "video"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": False,
        }
    )
