"""Pictures cropped on the devices against the host's, on any number of devices."""

import functools
import types

import jax
import numpy as np
import pytest
from PIL import Image

from vop_jax.errors import UserError
from vop_jax.training import device_cache, sharding
from vop_jax.training.device_cache import CacheLayout, DeviceCache, crop_frames, fill
from vop_jax.video.crops import apply_crop, centre_crop, draw_crop

F, SIZE, ROWS = 2, 16, 8
SHAPES = [(20, 30), (30, 20), (16, 16), (9, 40), (40, 12), (7, 8), (24, 32), (32, 24), (18, 18)]
RNG = np.random.default_rng(0)
CLIPS = [RNG.integers(0, 256, (F, *shape, 3), dtype=np.uint8) for shape in SHAPES]


def draw_rows(augment, seed):
    """(the pictures that the host crops, the rows of a batch of crops)."""
    rng = np.random.default_rng(seed)
    pictures, crops = [], []
    clips = rng.integers(0, len(SHAPES), ROWS)
    for clip in clips:
        shape = SHAPES[clip]
        crop = (
            draw_crop(shape, SIZE, rng, scale=(0.1, 1.0)) if augment else centre_crop(shape, SIZE)
        )
        pictures.append(apply_crop(CLIPS[clip], SIZE, crop))
        crops.append(crop.numbers())
    return np.stack(pictures), {"clip": clips.astype(np.int32), "crop": np.stack(crops)}


@pytest.mark.parametrize(
    "axes", [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "model": 2}], ids=str
)
def test_pictures_are_the_hosts_within_two_levels(monkeypatch, axes):
    monkeypatch.setattr(device_cache, "CHUNK", 2)  # filled in several turns, the last not full
    mesh = sharding.make_mesh(**axes)
    layout = CacheLayout(mesh, len(SHAPES), (F, 40, 40, 3))
    frames = fill(layout, CLIPS)
    assert frames.addressable_shards[0].data.nbytes == layout.bytes_per_device
    cache = DeviceCache(mesh, frames, SIZE)
    for seed in range(6):
        expected, rows = draw_rows(seed % 3 > 0, seed)
        batch = cache.add_frames(sharding.to_global(mesh, rows | {"ids": np.arange(ROWS)}))
        assert batch["frames"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 5)
        difference = np.abs(np.asarray(batch["frames"]).astype(int) - expected)
        assert difference.max() <= 2 and difference.mean() < 0.1
        np.testing.assert_array_equal(batch["ids"], np.arange(ROWS))
        assert batch.keys() == {"frames", "ids"}
    assert cache._crop._cache_size() == 1


def test_large_smooth_frames_are_within_two_levels():
    """Frames of real sizes, with edges at which the filter overshoots."""
    coarse = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)
    frames = np.asarray(picture)[None]
    frames = np.where(frames > 128, frames, 0).astype(np.uint8)
    crop_on_device = jax.jit(functools.partial(crop_frames, image_size=224))
    for seed in range(3):
        crop = draw_crop((240, 320), 224, np.random.default_rng(seed))
        cropped = np.asarray(crop_on_device(frames, crop.numbers())).astype(int)
        difference = np.abs(cropped - apply_crop(frames, 224, crop))
        assert difference.max() <= 2 and difference.mean() < 0.03


def test_a_cache_that_does_not_fit_is_refused_with_the_missing_memory():
    layout = CacheLayout(sharding.make_mesh(4), 9000, (12, 240, 320, 3))
    assert layout.bytes_per_device == 2250 * 12 * 240 * 320 * 3
    layout.check(6.3)
    with pytest.raises(UserError, match=r"cache_gb=5: .*take 6.22 GB on each of 4.* 1.22 GB too"):
        layout.check(5)
    device = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_limit": 3e9, "bytes_in_use": 1e9}, __str__=lambda: "gpu:0"
    )
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1}, local_devices=[device])
    with pytest.raises(UserError, match=r"has 2.00 GB left: .* 0.76 GB too much; use more dev"):
        CacheLayout(mesh, 1000, (12, 240, 320, 3)).check(100)  # type: ignore[arg-type]
