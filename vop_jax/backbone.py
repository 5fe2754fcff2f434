"""One frozen CLIP on the devices, and the programs that run it: what many prompt sets share."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.clip.weights import ClipWeights, held
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.training import sharding
from vop_jax.tuning.methods import MethodConfig

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
        dtype: of matmuls; the weights are held in it.
    """

    def __init__(self, weights: ClipWeights, dtype: str = "float32", devices: int | None = None):
        self.name, self.fingerprint, self.config = weights.name, weights.fingerprint, weights.config
        self.dtype = jnp.dtype(dtype)
        local = jax.local_devices()
        if devices is not None and not 0 < devices <= len(local):
            raise UserError(f"devices={devices}: available: {len(local)}")
        self._mesh = sharding.make_mesh(devices=local[:devices])
        params = held({"clip": weights.params}, self.dtype)
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
