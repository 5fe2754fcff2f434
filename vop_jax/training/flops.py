"""How long a program takes at least: its matrix products, and how fast a device multiplies."""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of a traced program's matrix products; of what devices do each for itself, of one."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * equation.outvars[0].aval.size
        turns = params["length"] if name == "scan" else 1
        if name == "pallas_call":
            turns = math.prod(params["grid_mapping"].grid)
        total += turns * sum(map(matmul_flops, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an operation calls."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


@functools.cache
def matmul_flops_per_second(dtype: str, platform: str) -> float:
    """FLOP/s of one large matrix product on this machine's first device, measured."""
    size = 1024 if platform == "cpu" else 8192
    matrix = jax.device_put(jnp.ones((size, size), dtype), jax.local_devices()[0])
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    since = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    return 2 * size**3 / (time.perf_counter() - since)
