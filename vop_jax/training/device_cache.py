"""The training split's frames on the devices, and the pictures of a batch cut out of them there.

The host draws as it always does, but sends numbers instead of pixels: a row's clip, the corner
of its crop, how the crop's sides are resized, whether it is mirrored. The pixels are those of
the host path to the bit: whole numbers are added up, see `pictures_of`.

Clips lie spread over the devices that rows are spread over. Each device cuts those rows of the
batch that it has the clips of, then every row travels to the device that trains on it: a
reduce-scatter in which all contributions but one are zero. A device sends
(n - 1) / n x B x F x S x S x 3 bytes a step, of n devices; with B = 512 rows of 12 frames of
224 pixels on 8 devices 0.8 GB. It holds B rows while it does.
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
DIGIT = 8  # bits of a weight at a time
ROWS = 4  # cut out at a time by a single device; an H200 is 1.5 times as fast as one by one

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where M clips of F frames, padded to one size, lie.

    Attributes:
        shape: (F, H, W, 3).
    """

    mesh: Mesh
    clips: int
    shape: tuple[int, int, int, int]

    @property
    def clips_per_device(self) -> int:
        return -(-self.clips // sharding.row_shards(self.mesh))

    @property
    def whole(self) -> tuple[int, ...]:
        """(M, F, H, W, 3), M filled up so that each device has as many clips."""
        return self.clips_per_device * sharding.row_shards(self.mesh), *self.shape

    @property
    def here(self) -> list[int]:
        """The clips that this process's devices hold, ascending."""
        held = sharding.process_rows(self.mesh, self.whole[0])
        return held[held < self.clips].tolist()

    @property
    def bytes_per_device(self) -> int:
        return self.clips_per_device * int(np.prod(self.shape, dtype=np.int64))

    def check(self, limit_gb: float) -> None:
        """Raises UserError where the frames do not fit: what is needed, what is missing.

        Args:
            limit_gb: the config's `data.device_cache_gb`.
        """
        key = "config.data.device_cache_gb"
        needed, (frames, height, width, _) = self.bytes_per_device, self.shape
        allowed, whose = limit_gb * 1e9, f"{key}={limit_gb:g}"
        for device in self.mesh.local_devices:
            stats = device.memory_stats() or {}  # not every platform tells
            free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
            if free < allowed:
                allowed, whose = free, f"{key}: {device} has {free / 1e9:.2f} GB left"
        if needed > allowed:
            raise UserError(
                f"{whose}: {self.clips:,} clips of {frames} frames of {height} x {width} pixels "
                f"take {needed / 1e9:.2f} GB on each of {sharding.row_shards(self.mesh)} devices, "
                f"{(needed - allowed) / 1e9:.2f} GB too much; use more devices, a smaller "
                "config.data.short_side, or set it to 0: frames are then read from the records"
            )


def fill(layout: Layout, clips: Iterable[np.ndarray]) -> jax.Array:
    """The clips `layout.here`, uint8 [F, h, w, 3] -> those of all, uint8 [M, F, H, W, 3]."""
    count, placement = layout.clips_per_device, sharding.batch_sharding(layout.mesh)
    holders = collections.defaultdict(list)  # of the clips from each number on
    for device, index in placement.addressable_devices_indices_map(layout.whole).items():
        assert index is not None  # those of devices elsewhere
        holders[index[0].indices(layout.whole[0])[0]].append(device)
    source, shards = iter(clips), []
    for first in sorted(holders):
        shards += _filled(layout, holders[first], source, min(count, layout.clips - first))
    next(source, None)  # a bar counts a clip when the next is asked for
    return jax.make_array_from_single_device_arrays(layout.whole, placement, shards)


def _filled(
    layout: Layout, devices: list[jax.Device], source: Iterator[np.ndarray], count: int
) -> list[jax.Array]:
    """The next `count` clips on each of these devices."""
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
    """A split's frames on the devices.

    Args:
        frames: uint8 [M, F, H, W, 3], of `fill`.
        first, weights: of all ways that a side is resized, int32 [n, S] and [n, S, K], see
            `data.resampling.Sides`.
        bits: of a weight's fraction.
    """

    def __init__(
        self, mesh: Mesh, frames: jax.Array, first: np.ndarray, weights: np.ndarray, bits: int
    ):
        self._frames = frames
        tables = {"first": first, "weights": weights}
        self._tables = sharding.place(mesh, tables)
        self._cut = jax.jit(sharding.map_row_shards(mesh, functools.partial(_own_rows, bits=bits)))

    def pictures(self, batch: Batch) -> Batch:
        """Numbers of a batch, as `data.decoded.Drawn.numbers` -> frames uint8 [B, F, S, S, 3]."""
        drawn = {name: batch[name] for name in ("clip", "corner", "sides", "mirrored")}
        others = {name: rows for name, rows in batch.items() if name not in drawn}
        return others | {"frames": self._cut(self._frames, (self._tables, drawn))}

    def before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, for batches of numbers."""
        return lambda state, frozen, batch: step(state, frozen, self.pictures(batch))


def _own_rows(frames: jax.Array, whole: tuple[Batch, Batch], *, bits: int) -> jax.Array:
    """This device's share of a batch's pictures, from its clips and all devices' draws."""
    tables, drawn = whole
    size = tables["first"].shape[1]
    nothing = jnp.zeros((frames.shape[1], size, size, 3), jnp.uint8)
    first_clip = sharding.row_shard_index() * frames.shape[0]

    def row(draw: Batch) -> jax.Array:
        clip = draw["clip"] - first_clip
        here = (clip >= 0) & (clip < frames.shape[0])
        how = {name: table[draw["sides"]] for name, table in tables.items()}
        how |= {name: draw[name] for name in ("corner", "mirrored")}
        return jax.lax.cond(
            here, lambda: pictures_of(frames[clip], **how, bits=bits), lambda: nothing
        )

    # Where all rows are this device's a few at a time; else one by one: others' cost nothing.
    together = ROWS if sharding.is_only_row_shard() else None
    return sharding.sum_and_scatter_rows(jax.lax.map(row, drawn, batch_size=together))


def pictures_of(
    frames: jax.Array,
    *,
    first: jax.Array,
    weights: jax.Array,
    corner: jax.Array,
    mirrored: jax.Array,
    bits: int,
) -> jax.Array:
    """A clip's pictures, as Pillow resizes them: uint8 [F, H, W, 3] -> [F, S, S, 3].

    Args:
        first, weights: int32 [2, S] and [2, S, K], of the vertical and the horizontal side.
        corner: int32 [2], top and left of the box.
        mirrored: bool, left to right.
        bits: of a weight's fraction.
    """
    height, width = frames.shape[1:3]
    across = _matrix(first[1] + corner[1], weights[1], width)  # [S, W]
    down = _matrix(first[0] + corner[0], weights[0], height)  # [S, H]
    x = _weighed("fhwc,dsw->dfhsc", frames, across, bits)  # [F, H, S, 3]
    x = _weighed("fhsc,dth->dftsc", x, down, bits)  # [F, S, S, 3]
    return jnp.where(mirrored, x[:, :, ::-1], x)


def _matrix(first: jax.Array, weights: jax.Array, length: int) -> jax.Array:
    """int32 [S] and [S, K] -> [S, length]: the weights where they belong, else 0."""
    at = first[:, None] + jnp.arange(weights.shape[1])[None]  # [S, K]
    chosen = at[..., None] == jnp.arange(length)[None, None]  # [S, K, length]
    return jnp.where(chosen, weights[..., None], 0).sum(axis=1)


def _weighed(equation: str, pixels: jax.Array, matrix: jax.Array, bits: int) -> jax.Array:
    """Sums of pixels with whole-number weights, rounded to uint8; exact on every device.

    A weight is cut into three digits of eight bits. These and the pixels are exact in bfloat16,
    their products and sums in the float32 that matmuls add up in.
    """
    digits, rest = [], matrix
    for _ in range(2):
        low = ((rest + 128) & 255) - 128  # signed, so that none is longer than eight bits
        digits.append(low)
        rest = (rest - low) >> DIGIT
    stacked = jnp.stack([*digits, rest]).astype(jnp.bfloat16)  # [3, S, length]
    parts = jnp.einsum(
        equation,
        pixels.astype(jnp.bfloat16),
        stacked,
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    total = parts[0] + (parts[1] << DIGIT) + (parts[2] << 2 * DIGIT)
    return ((total + (1 << bits - 1)) >> bits).clip(0, 255).astype(jnp.uint8)
