"""Softmax attention of short sequences on an NVIDIA GPU, forward and backward: Pallas kernels.

A frame of ViT-B/32 has 50 tokens: one head's scores fit into the registers of one program, which
reads queries, keys and values once and writes the output. Keys and values that many sequences
share (prompts) are read in place, never copied. The backward pass computes the weights again.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from vop_jax.clip.kernels.attention import KeyValues

LONGEST = 128  # tokens of a sequence
MIN_ROWS = 16  # of a matrix that a GPU multiplies
PARTS = tuple(np.int32(i) for i in range(3))  # the kernel's interpreter takes no plain int
MASKED = -1e30  # a score; not -inf, because padding rows attend to no key at all

Masks = tuple[jax.Array | None, jax.Array | None]


def supports(lengths: Sequence[int], width: int) -> bool:
    """Whether the kernel supports these numbers of own and extra keys and heads of K = `width`."""
    return max(lengths) <= LONGEST and 16 <= width <= 128 and width & (width - 1) == 0


def attention(
    packed: jax.Array,
    bias: jax.Array,
    mask: jax.Array | None = None,
    extra: KeyValues | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attention` over own and extra keys; the weights have the dtype of the values.

    Args:
        packed: [N, T, 3, H, K], queries, keys and values of each sequence without their biases.
        bias: [3, H, K]; the kernel adds it, which saves one pass over `packed`.
        mask: of own keys, as in `attention.KeyValues`.
        extra: further keys and values.
        interpret: runs the kernel as plain JAX, on any device.

    Returns:
        [N, T, H, K].
    """
    masks = tuple(
        None if x is None else _loadable(x, packed.shape[1])
        for x in (mask, extra.mask if extra else None)
    )
    pair = (extra.key, extra.value) if extra else ()
    return _attend(packed, bias, pair, masks, interpret)


def _loadable(mask: jax.Array, queries: int) -> jax.Array:
    """bool [N or 1, 1, T or 1, S] -> int8 [N or 1, T, S]."""
    return jnp.broadcast_to(mask[:, 0], (len(mask), queries, mask.shape[-1])).astype(jnp.int8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    packed: jax.Array, bias: jax.Array, extra: tuple, masks: Masks, interpret: bool
) -> jax.Array:
    """[N, T, H, K]; the arguments are those of `attention`, with `extra` (keys, values) or ()."""
    count, tokens, _, heads, width = packed.shape
    shapes: list[tuple[int, ...]] = [(count, tokens, heads, width)]
    return _call(_forward, (packed, bias, *extra), masks, (), shapes, interpret)[0]


def _attend_forward(*arguments: Any):
    return _attend(*arguments), arguments[:-1]


def _attend_backward(interpret: bool, residuals: tuple, gradient: jax.Array):
    packed, bias, extra, masks = residuals
    shapes = [packed.shape, *((len(packed), *x.shape[1:]) for x in extra)]
    arrays = packed, bias, *extra
    d_packed, *d_extra = _call(_backward, arrays, masks, (gradient,), shapes, interpret)

    def reduce_to(x: jax.Array, gradient: jax.Array) -> jax.Array:  # over those that share x
        groups = gradient.reshape(-1, *x.shape)
        return groups.astype(jnp.float32).sum(axis=0).astype(x.dtype)

    d_shared = tuple(reduce_to(x, d) for x, d in zip(extra, d_extra, strict=True))
    return d_packed, reduce_to(bias, d_packed), d_shared, tuple(None for _ in masks)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
    body: Any,
    arrays: tuple,
    masks: Masks,
    inputs: tuple,
    shapes: list[tuple[int, ...]],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `body` as one program for each sequence and head.

    Args:
        arrays: packed, bias, then extra keys and values.
        inputs, shapes: further arrays, and the shapes of the outputs.
    All but masks and bias are [N or M, T or P, (3,) H, K].
    """
    packed, bias, *extra = arrays
    count, tokens, _, heads, width = packed.shape

    def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        """One head of the sequence n modulo M."""
        rows, between = shape[0], shape[2:-2]
        block = (None, _padded(shape[1]), *between, None, width)
        return pl.BlockSpec(block, lambda n, h: (n % rows, 0, *(0 for _ in between), h, 0))

    def mask_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        block = (None, _padded(shape[1]), _padded(shape[2]))
        return pl.BlockSpec(block, lambda n, _: (n % shape[0], 0, 0))

    given_masks = [mask for mask in masks if mask is not None]
    others = [packed, *extra, *inputs]
    lengths = [tokens, *(x.shape[1] for x in extra[:1])]
    kernel = functools.partial(body, lengths=lengths, masked=[m is not None for m in masks])
    longest = max(map(_padded, lengths))
    call = pl.pallas_call(
        kernel,
        grid=(count, heads),
        in_specs=[
            *(mask_spec(mask.shape) for mask in given_masks),
            pl.BlockSpec((len(bias), None, width), lambda _, h: (0, h, 0)),
            *(spec(x.shape) for x in others),
        ],
        out_specs=[spec(shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct(shape, packed.dtype) for shape in shapes],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4 if longest <= 64 else 8, num_stages=1),
        name=f"fused_attention{body.__name__}",
    )
    return call(*given_masks, bias, *others)


def _padded(length: int) -> int:
    """The power of two that a GPU program works on."""
    return max(MIN_ROWS, 1 << (length - 1).bit_length())


def _before(shape: tuple[int, ...], axis: int, length: int) -> jax.Array:
    """bool of this shape: whether the index along the axis is less than `length`."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < length


def _load(ref: Any, length: int) -> jax.Array:
    """[padded, K], zeros after `length`."""
    return plgpu.load(ref, mask=_before(ref.shape, 0, length), other=0.0)


def _store(ref: Any, rows: jax.Array, length: int) -> None:
    plgpu.store(ref, rows.astype(ref.dtype), mask=_before(ref.shape, 0, length))


def _weights(refs: list, lengths: list[int], masked: list[bool]) -> tuple:
    """(queries, [(keys, values)], [weights], other refs), own first; a row's weights sum to 1."""
    masks = [refs.pop(0) if is_masked else None for is_masked in masked]
    bias, own = refs.pop(0), refs.pop(0)
    query, *pair = (
        _load(own.at[:, i, :], lengths[0]) + plgpu.load(bias.at[i, :])[None] for i in PARTS
    )
    pairs = [pair]
    if len(lengths) > 1:
        pairs.append([_load(refs.pop(0), lengths[1]) for _ in range(2)])
    scores = []
    for (key, _), length, mask in zip(pairs, lengths, masks, strict=False):
        score = plgpu.dot(query, key, trans_b=True) * query.shape[-1] ** -0.5
        visible = _before(score.shape, 1, length)
        if mask is not None:
            inside = visible & _before(score.shape, 0, lengths[0])
            visible = plgpu.load(mask, mask=inside, other=0) != 0
        scores.append(jnp.where(visible, score, MASKED))
    highest = functools.reduce(jnp.maximum, [x.max(axis=1) for x in scores])
    weights = [jnp.exp(x - highest[:, None]) for x in scores]
    total = functools.reduce(jnp.add, [x.sum(axis=1) for x in weights])
    return query, pairs, [x / total[:, None] for x in weights], refs


def _forward(*refs: Any, lengths: list[int], masked: list[bool]) -> None:
    _, pairs, weights, (out,) = _weights(list(refs), lengths, masked)
    mixed = [plgpu.dot(w.astype(v.dtype), v) for w, (_, v) in zip(weights, pairs, strict=True)]
    _store(out, functools.reduce(jnp.add, mixed), lengths[0])


def _backward(*refs: Any, lengths: list[int], masked: list[bool]) -> None:
    query, pairs, weights, (gradient_ref, d_own, *d_extra) = _weights(list(refs), lengths, masked)
    gradient = _load(gradient_ref, lengths[0])
    d_weights = [plgpu.dot(gradient, value, trans_b=True) for _, value in pairs]
    terms = [(w * x).sum(axis=1) for w, x in zip(weights, d_weights, strict=True)]
    mean = functools.reduce(jnp.add, terms)
    d_query_ref, *d_pair = (d_own.at[:, i, :] for i in PARTS)
    d_query = []
    for (key, _), w, x, length, (d_key, d_value) in zip(
        pairs, weights, d_weights, lengths, [d_pair, d_extra], strict=False
    ):
        d_scores = (w * (x - mean[:, None]) * query.shape[-1] ** -0.5).astype(query.dtype)
        d_query.append(plgpu.dot(d_scores, key))
        _store(d_key, plgpu.dot(d_scores, query, trans_a=True), length)
        _store(d_value, plgpu.dot(w.astype(gradient.dtype), gradient, trans_a=True), length)
    _store(d_query_ref, functools.reduce(jnp.add, d_query), lengths[0])
