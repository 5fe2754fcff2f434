"""Layer normalisation with its own backward pass.

Autodiff computes the statistics again; here they are kept, two numbers per token. On an NVIDIA
GPU one Pallas kernel also adds the two gradients that meet where a residual branch starts: XLA's
own fusion of both reaches 1.6 of an H200's 4 TB/s.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

EPS = 1e-5
ROWS = 4  # in one program of the kernel, one warp each

# The backward pass: plain JAX, the kernel, or the kernel interpreted on any device.
Backward = Literal["plain", "kernel", "interpreted"]


class LayerNorm(nn.Module):
    """Normalises the last axis of [..., D]; the statistics are float32 in every compute dtype."""

    dtype: jnp.dtype = jnp.float32

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.branch(x)[1]

    @nn.compact
    def branch(self, x: jax.Array, fused: bool = False) -> tuple[jax.Array, jax.Array]:
        """x [..., D] -> (x, normalised x): the residual path, and the input of a residual branch.

        Args:
            fused: the kernel computes the backward pass.
        """
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return normalized(x, scale, bias, self.dtype, "kernel" if fused else "plain")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalized(
    x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any, backward: Backward = "plain"
) -> tuple[jax.Array, jax.Array]:
    """(x, (x - mean) / sqrt(variance + EPS) * scale + bias), the second in `dtype`.

    Args:
        x: [..., D].
        scale, bias: [D].
    """
    return _forward(x, scale, bias, dtype, backward)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any, backward: Backward
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    # Not E[x^2] - E[x]^2, which loses digits needed for parity with PyTorch.
    variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + EPS)
    out = (wide - mean) * (inverse * _broadcast(scale, x)) + _broadcast(bias, x)
    return (x, out.astype(dtype)), (x, scale, mean, inverse)


def _broadcast(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[D] with the rank of x [..., D]."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _backward(dtype: Any, backward: Backward, residuals: tuple, gradients: tuple) -> tuple:
    """Gradients of x, scale and bias.

    With z = (x - mean) / deviation and g = scale * dL/dout, dL/dx of the branch is
    (g - mean(g) - z mean(g z)) / deviation.
    """
    x, scale, mean, inverse = residuals
    d_residual, d_out = gradients
    z = (x.astype(jnp.float32) - mean) * inverse
    wide = d_out.astype(jnp.float32)
    others = tuple(range(x.ndim - 1))
    # The compiler drops these where scale and bias are frozen.
    d_scale, d_bias = (wide * z).sum(axis=others), wide.sum(axis=others)
    if backward != "plain":
        return _kernel(x, scale, d_residual, d_out, backward == "interpreted"), d_scale, d_bias
    g = wide * _broadcast(scale, x)
    d_branch = g - g.mean(axis=-1, keepdims=True) - z * (g * z).mean(axis=-1, keepdims=True)
    d_x = d_residual.astype(jnp.float32) + d_branch * inverse
    return d_x.astype(x.dtype), d_scale, d_bias


normalized.defvjp(_forward, _backward)


def _kernel(
    x: jax.Array, scale: jax.Array, d_residual: jax.Array, d_out: jax.Array, interpret: bool
) -> jax.Array:
    """The gradient of x [..., D], one program for each `ROWS` rows."""
    # Not every platform's jaxlib has what the kernel needs.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    width = x.shape[-1]
    arrays = [array.reshape(-1, width) for array in (x, d_residual, d_out)]
    count, padded = len(arrays[0]), pl.next_power_of_2(width)

    def kernel(x_ref: Any, residual_ref: Any, out_ref: Any, scale_ref: Any, dx_ref: Any) -> None:
        column = jax.lax.broadcasted_iota(jnp.int32, (ROWS, padded), 1)
        row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, padded), 0) + pl.program_id(0) * ROWS
        inside = (column < width) & (row < count)

        def load(ref: Any) -> jax.Array:
            return plgpu.load(ref, mask=inside, other=0.0).astype(jnp.float32)

        def mean(value: jax.Array) -> jax.Array:
            return value.sum(axis=1, keepdims=True) / width

        x = load(x_ref)
        centred = jnp.where(inside, x - mean(x), 0.0)
        inverse = jax.lax.rsqrt(mean(jnp.square(centred)) + EPS)
        z = centred * inverse
        in_row = jax.lax.broadcasted_iota(jnp.int32, (padded,), 0) < width
        g = load(out_ref) * plgpu.load(scale_ref, mask=in_row, other=0.0)[None]
        d_branch = (g - mean(g) - z * mean(g * z)) * inverse
        plgpu.store(dx_ref, (load(residual_ref) + d_branch).astype(dx_ref.dtype), mask=inside)

    rows = pl.BlockSpec((ROWS, padded), lambda i: (i, 0))
    d_x = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, ROWS),),
        in_specs=[rows, rows, rows, pl.BlockSpec((padded,), lambda i: (0,))],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=ROWS, num_stages=1),
        name="layer_norm_backward",
    )(*arrays, scale)
    return d_x.reshape(x.shape)
