"""The frames of the training split on the devices, and crops of them computed there.

The host draws crops as always, but sends each as nine numbers instead of pixels. The pictures
differ from the host's by rounding, at most 2 of 255 levels.

Clips are spread over the devices that rows are spread over. Each device crops those rows of the
batch whose clips it holds; then every row travels to the device that trains on it: a
reduce-scatter in which all contributions but one are zero. Of n devices, each sends
(n - 1) / n x B x F x S x S x 3 bytes a step, 0.8 GB for B = 512, F = 12, S = 224 on 8 devices,
and holds B rows meanwhile.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vop_jax.errors import UserError
from vop_jax.training import sharding

CHUNK = 64  # clips that the host holds while it fills the cache
ROWS = 4  # cropped at a time by a single device; an H200 is 1.5 times as fast as one by one

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Where M clips of F frames, padded to one size, lie.

    Attributes:
        shape: (F, H, W, 3) of a padded clip.
    """

    mesh: Mesh
    clips: int
    shape: tuple[int, int, int, int]

    @property
    def clips_per_device(self) -> int:
        """M / devices, rounded up."""
        return -(-self.clips // sharding.row_shards(self.mesh))

    @property
    def global_shape(self) -> tuple[int, ...]:
        """(M, F, H, W, 3), M rounded up to a multiple of the devices."""
        return self.clips_per_device * sharding.row_shards(self.mesh), *self.shape

    @property
    def local_clips(self) -> list[int]:
        """The clips on this process's devices, ascending."""
        rows = sharding.process_rows(self.mesh, self.global_shape[0])
        return rows[rows < self.clips].tolist()

    @property
    def bytes_per_device(self) -> int:
        return self.clips_per_device * int(np.prod(self.shape, dtype=np.int64))

    def check(self, limit_gb: float) -> None:
        """Raises UserError if the frames do not fit, with what is needed and what is missing.

        Args:
            limit_gb: the config's `data.device_cache_gb`.
        """
        key = "config.data.device_cache_gb"
        needed, (frames, height, width, _) = self.bytes_per_device, self.shape
        allowed, limit = limit_gb * 1e9, f"{key}={limit_gb:g}"
        for device in self.mesh.local_devices:
            stats = device.memory_stats() or {}  # some platforms have none
            free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
            if free < allowed:
                allowed, limit = free, f"{key}: {device} has {free / 1e9:.2f} GB left"
        if needed > allowed:
            raise UserError(
                f"{limit}: {self.clips:,} clips of {frames} frames of {height} x {width} pixels "
                f"take {needed / 1e9:.2f} GB on each of {sharding.row_shards(self.mesh)} devices, "
                f"{(needed - allowed) / 1e9:.2f} GB too much; use more devices, a smaller "
                "config.data.short_side, or set it to 0 to read frames from the records"
            )


def fill(layout: CacheLayout, clips: Iterable[np.ndarray]) -> jax.Array:
    """The clips `layout.local_clips`, uint8 [F, h, w, 3] -> all clips, uint8 [M, F, H, W, 3]."""
    placement = sharding.batch_sharding(layout.mesh)
    devices_of = collections.defaultdict(list)  # first clip of a shard -> its devices
    for device, index in placement.addressable_devices_indices_map(layout.global_shape).items():
        assert index is not None  # None for devices of other processes
        devices_of[index[0].indices(layout.global_shape[0])[0]].append(device)
    source, shards = iter(clips), []
    for first in sorted(devices_of):
        count = min(layout.clips_per_device, layout.clips - first)
        shards += _fill_shard(layout, devices_of[first], source, count)
    next(source, None)  # a progress bar counts a clip when the next one is requested
    return jax.make_array_from_single_device_arrays(layout.global_shape, placement, shards)


def _fill_shard(
    layout: CacheLayout, devices: list[jax.Device], source: Iterator[np.ndarray], count: int
) -> list[jax.Array]:
    """Copies the next `count` clips to each of these devices."""
    shape = (layout.clips_per_device, *layout.shape)
    shards = [jnp.zeros(shape, jnp.uint8, device=device) for device in devices]
    for start in range(0, count, CHUNK):
        chunk = np.zeros((min(CHUNK, count - start), *layout.shape), np.uint8)
        for padded in chunk:
            pixels = next(source)
            padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        shards = [
            _write(shard, jax.device_put(chunk, device), start)
            for shard, device in zip(shards, devices, strict=True)
        ]
    return shards


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, chunk: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(shard, chunk, start, 0)


class DeviceCache:
    """The frames of a split on the devices.

    Args:
        frames: uint8 [M, F, H, W, 3], of `fill`.
        image_size: S.
    """

    def __init__(self, mesh: Mesh, frames: jax.Array, image_size: int):
        self._frames = frames
        crop = functools.partial(_crop_rows, image_size=image_size)
        self._crop = jax.jit(sharding.map_row_shards(mesh, crop))

    def add_frames(self, batch: Batch) -> Batch:
        """{"clip" [B], "crop" [B, 9], …} -> {"frames": uint8 [B, F, S, S, 3], …}."""
        others = {name: rows for name, rows in batch.items() if name not in ("clip", "crop")}
        return others | {"frames": self._crop(self._frames, (batch["clip"], batch["crop"]))}

    def wrap_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, for batches of crops."""
        return lambda state, frozen, batch: step(state, frozen, self.add_frames(batch))


def _crop_rows(
    frames: jax.Array, rows: tuple[jax.Array, jax.Array], *, image_size: int
) -> jax.Array:
    """Its clips [m, F, H, W, 3], and all rows of a batch -> this device's rows [b, F, S, S, 3]."""
    zeros = jnp.zeros((frames.shape[1], image_size, image_size, 3), jnp.uint8)
    first_clip = sharding.row_shard_index() * frames.shape[0]

    def crop_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        clip, crop = row[0] - first_clip, row[1]
        is_local = (clip >= 0) & (clip < frames.shape[0])
        return jax.lax.cond(
            is_local, lambda: crop_frames(frames[clip], crop, image_size), lambda: zeros
        )

    # `batch_size` computes both branches of `cond`: with other devices' rows, that is a waste.
    together = ROWS if sharding.is_only_row_shard() else None
    return sharding.sum_and_scatter_rows(jax.lax.map(crop_row, rows, batch_size=together))


def crop_frames(frames: jax.Array, crop: jax.Array, image_size: int) -> jax.Array:
    """`video.crops.apply_crop` on a device: uint8 [F, H, W, 3] -> [F, S, S, 3].

    Two matrix products, as `jax.image.scale_and_translate` would do it, but that one would let
    pixels outside the box into its edges.

    Args:
        crop: int32 [9], of `Crop.numbers`.
    """
    top, left, height, width, rows, columns, window_top, window_left, mirrored = crop
    down = _resize_matrix(frames.shape[1], top, height, rows, window_top, image_size)
    across = _resize_matrix(frames.shape[2], left, width, columns, window_left, image_size)
    across = jnp.where(mirrored, across[::-1], across)
    x = _to_uint8(_product("fhwc,sw->fhsc", frames, across) / _sums(across)[None, None, :, None])
    return _to_uint8(_product("fhsc,th->ftsc", x, down) / _sums(down)[None, :, None, None])


def _product(equation: str, pixels: jax.Array, weights: jax.Array) -> jax.Array:
    # Pixels are exact in bfloat16, sums are float32. Dividing by the sum of the rounded weights
    # keeps flat areas flat: 99 % of the pixels are then those of Pillow.
    return jnp.einsum(
        equation, pixels.astype(jnp.bfloat16), weights, preferred_element_type=jnp.float32
    )


def _sums(weights: jax.Array) -> jax.Array:
    return weights.sum(axis=1, dtype=jnp.float32)


def _resize_matrix(
    length: int,
    start: jax.Array,
    box: jax.Array,
    resized: jax.Array,
    window: jax.Array,
    image_size: int,
) -> jax.Array:
    """bfloat16 [S, length]: the weights with which Pillow's bicubic filter resizes one side.

    Args:
        length: pixels of the padded frame.
        start, box: first pixel and length of the box.
        resized, window: length of the resized box, first pixel of the window in it.
    """
    scale = box / resized
    coarse = jnp.maximum(scale, 1.0)  # when it shrinks, the filter widens and so antialiases
    centre = (jnp.arange(image_size)[:, None] + window + 0.5) * scale  # [S, 1]
    pixel = jnp.arange(length)[None] - start  # [1, length]
    x = jnp.abs(pixel + 0.5 - centre) / coarse
    # Keys' cubic convolution filter with a = -1/2.
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
    weights = jnp.where((pixel >= 0) & (pixel < box), weights, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(jnp.bfloat16)


def _to_uint8(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(x + 0.5), 0, 255).astype(jnp.uint8)
