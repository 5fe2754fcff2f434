"""Frames of another type, and those that patches do not fill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.model import normalize_pixels, patches


def test_frames_of_another_type_are_refused():
    with pytest.raises(TypeError, match="frames are uint8 RGB, not float32"):
        normalize_pixels(jnp.zeros((1, 4, 4, 3)))


def test_a_product_of_patches_is_the_convolution():
    rng = np.random.default_rng(0)
    # Of 14 pixels, two belong to no patch.
    x, kernel = rng.normal(size=(2, 14, 14, 3)), rng.normal(size=(4, 4, 3, 5))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=numbers)
    product = patches(jnp.asarray(x), 4) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(product, out.reshape(2, -1, 5), atol=1e-4)
