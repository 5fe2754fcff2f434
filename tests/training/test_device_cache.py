"""Pictures cut out on the devices: the host's, to the bit, on any number of devices."""

import types

import numpy as np
import pytest

from vop_jax.data.device_crops import BITS, Drawn
from vop_jax.errors import UserError
from vop_jax.training import device_cache, sharding
from vop_jax.training.device_cache import DeviceCache, Layout, fill
from vop_jax.video.crops import centre_cut, cut_out, draw_cut

F, SIZE, ROWS = 2, 16, 8
SHAPES = [(20, 30), (30, 20), (16, 16), (9, 40), (40, 12), (7, 8), (24, 32), (32, 24), (18, 18)]


def clips():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (F, *shape, 3), dtype=np.uint8) for shape in SHAPES]


def cached(mesh, augment):
    layout = Layout(mesh, len(SHAPES), (F, 40, 40, 3))
    drawn = Drawn.of(SHAPES, SIZE, augment)
    sides = drawn.sides
    frames = fill(layout, clips())
    return DeviceCache(mesh, frames, sides.first, sides.weights, BITS), drawn


def draws(drawn, augment, seed):
    """(the pictures that the host cuts out, what the devices are told)."""
    rng = np.random.default_rng(seed)
    pictures, told = [], []
    for clip in rng.integers(0, len(SHAPES), ROWS):
        shape = SHAPES[clip]
        cut = draw_cut(shape, SIZE, rng, scale=(0.1, 1.0)) if augment else centre_cut(shape, SIZE)
        pictures.append(cut_out(clips()[clip], SIZE, cut))
        told.append(drawn.numbers(clip, cut))
    return np.stack(pictures), {key: np.stack([row[key] for row in told]) for key in told[0]}


@pytest.mark.parametrize("augment", [True, False], ids=["crops", "centre"])
@pytest.mark.parametrize(
    "axes", [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "model": 2}], ids=str
)
def test_pictures_equal_the_hosts_in_every_pixel(axes, augment):
    mesh = sharding.make_mesh(**axes)
    cache, drawn = cached(mesh, augment)
    mirrored = 0
    for seed in range(4):
        expected, told = draws(drawn, augment, seed)
        mirrored += told["mirrored"].sum()
        batch = sharding.to_global(mesh, told | {"ids": np.arange(ROWS)})
        found = cache.pictures(batch)
        assert found["frames"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 5)
        np.testing.assert_array_equal(found["frames"], expected)
        np.testing.assert_array_equal(found["ids"], np.arange(ROWS))
        assert found.keys() == {"frames", "ids"}
    assert bool(mirrored) == augment
    assert cache._cut._cache_size() == 1


def test_the_cache_is_filled_in_order_and_padded(monkeypatch):
    monkeypatch.setattr(device_cache, "CHUNK", 2)
    for count in (1, 4, 8):
        mesh = sharding.make_mesh(count)
        layout = Layout(mesh, len(SHAPES), (F, 40, 40, 3))
        frames = fill(layout, clips())
        assert frames.shape == (layout.clips_per_device * count, F, 40, 40, 3)
        shard = frames.addressable_shards[0].data
        assert shard.nbytes == layout.bytes_per_device
        for held, pixels in zip(np.asarray(frames), clips(), strict=False):
            _, h, w, _ = pixels.shape
            np.testing.assert_array_equal(held[:, :h, :w], pixels)
            assert not held[:, h:].any() and not held[:, :, w:].any()


def test_a_cache_that_does_not_fit_tells_what_is_missing():
    layout = Layout(sharding.make_mesh(4), 9000, (12, 240, 320, 3))
    assert layout.bytes_per_device == 2250 * 12 * 240 * 320 * 3
    layout.check(6.3)
    with pytest.raises(UserError, match=r"cache_gb=5: .*take 6.22 GB on each of 4.* 1.22 GB too"):
        layout.check(5)


def test_a_device_without_the_memory_is_told():
    device = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_limit": 3e9, "bytes_in_use": 1e9}, __str__=lambda: "gpu:0"
    )
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1}, local_devices=[device])
    with pytest.raises(UserError, match=r"has 2.00 GB left: .* 0.76 GB too much; use more dev"):
        Layout(mesh, 1000, (12, 240, 320, 3)).check(100)  # type: ignore[arg-type]
