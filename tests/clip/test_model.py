"""Pixels and patches: CLIP's normalisation, and the convolution that embeds patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD, normalize_pixels, patches


def test_pixels_are_normalised_per_channel():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    expected = (frames / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    np.testing.assert_allclose(normalize_pixels(jnp.asarray(frames)), expected, atol=2e-6)
    with pytest.raises(TypeError, match="frames are uint8 RGB, not float32"):
        normalize_pixels(jnp.zeros((1, 4, 4, 3)))


@pytest.mark.parametrize("side", [12, 14])  # of 14, two pixels belong to no patch
def test_a_product_of_patches_is_the_convolution(side):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(4, 4, 3, 5))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=numbers)
    product = patches(jnp.asarray(x), 4) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(product, out.reshape(2, -1, 5), atol=1e-4)
