"""Matrix products of the compute dtype that add up in float32.

TPUs and GPUs do so whatever the result's dtype. XLA on a CPU does so, and uses the matrix unit
(AMX), only if the result is float32. So on CPUs the results of the forward pass and of both
gradients are float32 and are rounded at once.
"""

import functools
import itertools
import string
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

FASTER = 1.3  # times as fast as float32, before bfloat16 is worth its rounding

# Results of products with weights have this name for `jax.checkpoint`.
WITH_WEIGHTS = "product with weights"

Axes = tuple[Sequence[int], Sequence[int]]  # of the left and of the right operand


def dot_general(
    x: jax.Array,
    weights: jax.Array,
    dimension_numbers: tuple[Axes, Axes],
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """The product of flax's dense layers: `jax.lax.dot_general`, the result in x's dtype."""
    if x.dtype == jnp.bfloat16:
        out = einsum(equation(x.ndim, weights.ndim, *dimension_numbers), x, weights)
    else:
        out = jax.lax.dot_general(x, weights, dimension_numbers, precision, preferred_element_type)
    return checkpoint_name(out, WITH_WEIGHTS)


Dense = functools.partial(nn.Dense, dot_general=dot_general)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dot_general)


def linear(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[..., D] and [D, E] -> [..., E]."""
    return dot_general(x, weights, (((x.ndim - 1,), (0,)), ((), ())))


def equation(x_rank: int, y_rank: int, contracted: Axes, batch: Axes) -> str:
    """Dimension numbers of `jax.lax.dot_general` in the notation of `einsum`."""
    x = list(string.ascii_lowercase[:x_rank])
    y = list(string.ascii_uppercase[:y_rank])
    for axes in (contracted, batch):
        for i, j in zip(*axes, strict=True):
            y[j] = x[i]
    shared = [x[i] for i in batch[0]]
    free = [letter for letter in x if letter not in y] + [letter for letter in y if letter not in x]
    return f"{''.join(x)},{''.join(y)}->{''.join(shared + free)}"


def merge_axes(equation: str, sizes: Sequence[int]) -> tuple[str, list[list[int]]]:
    """The equation with one letter for axes that are neighbours wherever they stand.

    XLA on a CPU transposes weights of more than two axes before it multiplies by them. Axes that
    begin the left operand and are summed over stay: XLA is slow with them merged.

    Args:
        sizes: of the axes of both operands.

    Returns:
        The equation, and the shapes of both operands in it and of the result without it.
    """
    terms = equation.replace("->", ",").split(",")
    size = dict(zip(terms[0] + terms[1], sizes, strict=True))
    result = [size[letter] for letter in terms[2]]
    # From the right, so that three neighbours become two, then one.
    for left, right in [p for term in terms for p in reversed([*itertools.pairwise(term)])]:
        summed_first = terms[0].startswith(left) and left not in terms[2]
        together = all(left + right in term for term in terms if left in term or right in term)
        if together and not summed_first:
            terms = [term.replace(right, "") for term in terms]
            size[left] *= size[right]
    shapes = [[size[letter] for letter in term] for term in terms[:2]]
    return f"{terms[0]},{terms[1]}->{terms[2]}", [*shapes, result]


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, which is also the result's if `dtype` is None.

    Args:
        equation: each letter stands in two of its three parts at least.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if x.dtype == jnp.float32:
        return jnp.einsum(equation, x, y, preferred_element_type=dtype)
    return _rounded(equation, dtype, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(equation: str, dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    def cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        terms, (left, right, out) = merge_axes(equation, x.shape + y.shape)
        x, y = x.reshape(left), y.reshape(right)
        product = jnp.einsum(terms, x, y, preferred_element_type=jnp.float32)
        return product.astype(dtype).reshape(out)

    def others(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=cpu, default=others)


def _forward(
    equation: str, dtype: Any, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded(equation, dtype, x, y), (x, y)


def _backward(
    equation: str, dtype: Any, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Autodiff would multiply a float32 gradient by a bfloat16 operand."""
    (x, y), (left, right, out) = operands, equation.replace("->", ",").split(",")
    gradient = gradient.astype(x.dtype)
    d_x = _rounded(f"{out},{right}->{left}", x.dtype, gradient, y)
    d_y = _rounded(f"{left},{out}->{right}", y.dtype, x, gradient)
    return d_x, d_y


_rounded.defvjp(_forward, _backward)


@functools.cache
def flops_per_second(dtype: str, device: jax.Device) -> float:
    """The rate of one large product, measured on a device, FLOP/s."""
    size = 1024 if device.platform == "cpu" else 8192
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(linear).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def fastest_dtype(device: jax.Device) -> str:
    """bfloat16 where the device multiplies it clearly faster than float32, which is measured."""
    rates = {dtype: flops_per_second(dtype, device) for dtype in ("bfloat16", "float32")}
    chosen = "bfloat16" if rates["bfloat16"] > FASTER * rates["float32"] else "float32"
    measured = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in rates.items())
    logging.info("matrix products in %s; measured, in GFLOP/s: %s", chosen, measured)
    return chosen
