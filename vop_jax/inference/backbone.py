"""A CLIP on the devices: its towers, read when something needs them, and compiled programs."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vop_jax.clip.kernels import products
from vop_jax.clip.weights import ClipFile, cast_frozen, parameter_shapes
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.training import program_cache, sharding
from vop_jax.tuning.methods import MethodConfig

# A batch is padded to one of these numbers of rows, rounded up to a multiple of the devices; larger
# batches are split. So few programs serve all sizes: one is compiled for each size that occurs.
BATCH_SIZES = {
    "encode_text": (1, 4, 16, 64, 128, 256),
    "encode_video": (1, 4, 16),
    "encode_frames": (1, 4, 16),
}
# In bfloat16 on CPUs one clip keeps the cores busy, and its layers' results stay in their caches.
CPU_BATCH_SIZES = {**BATCH_SIZES, "encode_video": (1,), "encode_frames": (1,)}
TOWERS = {"encode_text": "text", "encode_video": "visual", "encode_frames": "visual"}


class Backbone:
    """A CLIP on the devices and its compiled programs, shared by all prompts over it; thread-safe.

    Attributes:
        name, fingerprint, config: of the CLIP.
        dtype: of the weights and of matrix products, "auto" resolved.
    """

    def __init__(self, clip: ClipFile, dtype: str = "float32", devices: int | None = None):
        self.name, self.fingerprint, self.config = clip.name, clip.fingerprint, clip.config
        local = jax.local_devices()
        if devices is not None and not 0 < devices <= len(local):
            raise UserError(f"devices={devices}: must be 1 to {len(local)}")
        self.dtype = jnp.dtype(products.fastest_dtype(local[0]) if dtype == "auto" else dtype)
        one_by_one = self.dtype == jnp.bfloat16 and local[0].platform == "cpu"
        self._batch_sizes = CPU_BATCH_SIZES if one_by_one else BATCH_SIZES
        self._mesh = sharding.make_mesh(devices=local[:devices])
        self._clip, self._reader = clip, ThreadPoolExecutor(1)
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._towers: dict[str, Future[dict[str, Any]]] = {}
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

    def place(self, trained: tensors.Tree) -> dict[str, Any]:
        """{"a/b/c": array on the devices} of a method's trained parameters."""
        return tensors.flatten(sharding.place(self._mesh, dict(trained)))

    def tower(self, name: str) -> "Future[dict[str, Any]]":
        """{"clip/b/c": array on the devices} of "visual" or "text", which a thread reads."""
        with self._lock:
            if name not in self._towers:
                self._towers[name] = self._reader.submit(self._read, name)
            return self._towers[name]

    def _read(self, tower: str) -> dict[str, Any]:
        params = cast_frozen({"clip": self._clip.take(tower)}, self.dtype)
        return tensors.flatten(sharding.place(self._mesh, params))

    def run(
        self, encoder: str, method: MethodConfig, trained: dict[str, Any], rows: np.ndarray
    ) -> np.ndarray:
        """Encodes rows [N, ...] to float32 [N, ...].

        Args:
            encoder: a function of the model, one of `BATCH_SIZES`.
            method, trained: of the model, see `place`.
            rows: at least one.

        Raises:
            UserError: the CLIP's file has changed since it was written.
        """
        limit = self._round_up(self._batch_sizes[encoder][-1])
        parts = [rows[i : i + limit] for i in range(0, len(rows), limit)]
        # All parts are started before the first is copied back.
        outputs = [self._start(encoder, method, trained, part) for part in parts]
        vectors = [np.asarray(out)[: len(part)] for out, part in zip(outputs, parts, strict=True)]
        return np.concatenate(vectors)

    def _start(
        self, encoder: str, method: MethodConfig, trained: dict[str, Any], rows: np.ndarray
    ) -> Any:
        tower = self.tower(TOWERS[encoder])
        size = next(n for n in map(self._round_up, self._batch_sizes[encoder]) if n >= len(rows))
        rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        placed = jax.device_put(rows, sharding.batch_sharding(self._mesh))
        program = self._program(encoder, method, trained, placed)  # while the tower is read
        return program(_params(encoder, tower.result(), trained), placed)

    def _round_up(self, size: int) -> int:
        """To a multiple of the devices."""
        devices = self._mesh.size
        return -(-size // devices) * devices

    def _program(
        self, encoder: str, method: MethodConfig, trained: dict[str, Any], rows: jax.Array
    ) -> Any:
        """The compiled program of a method for a number of rows."""
        key = encoder, method, rows.shape
        with self._compiling:  # threads that need one program compile it once
            if key not in self._programs:
                model = self.model(method)

                def encode(params, rows):
                    return model.apply({"params": params}, rows, method=encoder)

                def lower() -> jax.stages.Lowered:
                    params = _params(encoder, self._frozen_shapes(), trained)
                    replicated = sharding.replicated(self._mesh)
                    return jax.jit(encode, out_shardings=replicated).lower(params, rows)

                about = key, self.config, self.dtype.name, rows.dtype.name
                dtypes = [(name, leaf.dtype.name) for name, leaf in trained.items()]
                devices = [*self._mesh.devices.flat]
                self._programs[key] = program_cache.load_or_compile((about, dtypes), devices, lower)
            return self._programs[key]

    def _frozen_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """{"clip/b/c": shape, dtype and placement} of both towers."""
        shapes = {
            f"clip/{name}": jax.ShapeDtypeStruct(shape, np.float32)
            for name, shape in parameter_shapes(self.config).items()
        }
        params = cast_frozen(tensors.unflatten(shapes), self.dtype)
        placement = sharding.parameter_shardings(self._mesh, params)
        placed = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), params, placement)
        return tensors.flatten(placed)


def _params(encoder: str, frozen: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The parameters that an encoder uses: trained ones, and the rest of its tower."""
    other = {"text": "visual", "visual": "text"}[TOWERS[encoder]]
    flat = {**frozen, **trained}
    used = {k: leaf for k, leaf in flat.items() if not k.startswith(f"clip/{other}/")}
    return tensors.unflatten(used)
