"""The patch embedding against the convolution that it is in the paper's CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vop_jax.clip.model import patches


def by_convolution(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    size = kernel.shape[:2]
    out = jax.lax.conv_general_dilated(x, kernel, size, "VALID", dimension_numbers=numbers)
    return out.reshape(len(x), -1, kernel.shape[-1])


def by_product(x, kernel):
    return patches(x, len(kernel)) @ kernel.reshape(-1, kernel.shape[-1])


@pytest.mark.parametrize("side", [12, 14])  # of which two pixels belong to no patch
def test_a_product_of_patches_is_the_convolution(side):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, side, side, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 4, 3, 5)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(2, 9, 5)), jnp.float32)

    def result(embed):
        def value(kernel):
            out = embed(x, kernel)
            return (out * weight).sum(), out

        return jax.grad(value, has_aux=True)(kernel)

    for ours, theirs in zip(result(by_product), result(by_convolution), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
