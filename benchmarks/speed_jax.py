"""The JAX side of `benchmarks.speed`: the programs that a run compiles, on one device."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step_cost import Programs, peak_bytes
from vop_jax.clip.kernels import products
from vop_jax.clip.weights import cast_frozen
from vop_jax.config.base import base_config
from vop_jax.config.clip import ClipConfig
from vop_jax.evaluation.evaluate import make_encoders
from vop_jax.evaluation.metrics import rank_pairs
from vop_jax.storage import tensors
from vop_jax.training.sharding import make_mesh
from vop_jax.training.step import TrainState, make_optimizer
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import merge, partition


def draw(programs: Programs, clip: ClipConfig) -> tuple[dict, dict]:
    """Random ({name: parameter}, {"frames", "ids"}) for both frameworks."""
    rng = np.random.default_rng(0)
    rows = programs.shapes[2]
    frames = rng.integers(0, 256, rows["frames"].shape, dtype=np.uint8)
    ids = np.zeros(rows["ids"].shape, np.int32)
    for row in ids:  # SOS, words, EOT, zeros
        length = rng.integers(min(8, len(row) - 2), len(row) - 1)
        row[:length] = rng.integers(0, clip.vocab_size - 1, length)
        row[length] = clip.vocab_size - 1
    flat = {
        name: rng.normal(name.endswith("scale"), 0.02, leaf.shape).astype(np.float32)
        for name, leaf in programs.model.shapes().items()
    }
    return flat, {"frames": frames, "ids": ids}


class JaxPrograms:
    """The compiled programs of one method, and their arguments on the device."""

    def __init__(
        self, programs: Programs, clip: ClipConfig, method: MethodConfig, flat: Mapping, rows: dict
    ):
        self.programs = programs
        self.rows = jax.device_put(rows)
        params = tensors.unflatten({k: jnp.array(v) for k, v in flat.items()})
        self.trainable, frozen = partition(params, method.trainable_patterns(clip))
        self.frozen = cast_frozen(frozen, programs.model.dtype)
        self.params = merge(self.trainable, self.frozen)

    def program(self, what: str, videos: int) -> Callable[[], Any]:
        """Of "forward", "step" or "evaluation" of that many `videos`; returns what to wait for."""
        return {"forward": self._forward, "step": self._step}.get(
            what, lambda: self._evaluation(videos)
        )()

    def _forward(self) -> Callable[[], Any]:
        forward = self.programs.forward
        return lambda: forward(self.trainable, self.frozen, self.rows)

    def _step(self) -> Callable[[], Any]:
        trainable = jax.tree.map(jnp.array, self.trainable)  # copies: the step overwrites them
        state = TrainState.create(trainable, make_optimizer(base_config().train))

        train_step = self.programs.step

        def step():
            nonlocal state
            state, metrics = train_step(state, self.frozen, self.rows)
            return metrics["loss"]

        return step

    def _evaluation(self, videos: int) -> Callable[[], Any]:
        video, text = make_encoders(self.programs.model, make_mesh(1, devices=jax.devices()[:1]))
        batches = range(videos // len(self.rows["ids"]))

        def evaluation():
            texts = [text(self.params, self.rows["ids"]) for _ in batches]
            clips = [video(self.params, self.rows["frames"]) for _ in batches]
            text_rows, video_rows = np.concatenate(texts), np.concatenate(clips)
            return rank_pairs(text_rows, video_rows, np.arange(len(video_rows))).t2v

        return evaluation

    def peak_bytes(self, what: str) -> int | None:
        """By the compiler; an evaluation is several programs."""
        return None if what == "evaluation" else peak_bytes(getattr(self.programs, what))


def matmul(size: int, dtype: str) -> Callable[[], Any]:
    """A product of two matrices [size, size]."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(products.linear)
    return lambda: product(left, right)
