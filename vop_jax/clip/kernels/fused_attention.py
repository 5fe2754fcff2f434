"""Softmax attention of short sequences on an NVIDIA GPU, in one piece: a Pallas kernel.

A frame of ViT-B/32 has 50 tokens: one head's scores fit into the registers of one program, which
reads queries, keys and values once and writes what comes out. What many sequences look at is read
where it lies, so nothing is appended to each one's own keys. The backward pass computes the
weights again.
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
LEAST = 16  # rows of a matrix that a GPU multiplies
PARTS = tuple(np.int32(i) for i in range(3))  # the kernel's interpreter takes no plain int
HIDDEN = -1e30  # a score; not -inf, for rows behind the last token see nothing at all

Masks = tuple[jax.Array | None, jax.Array | None]


def supports(lengths: Sequence[int], width: int) -> bool:
    """Whether the kernel is made for so many tokens, own and beside, in heads of K = `width`."""
    return max(lengths) <= LONGEST and 16 <= width <= 128 and width & (width - 1) == 0


def attention(
    packed: jax.Array,
    bias: jax.Array,
    mask: jax.Array | None = None,
    beside: KeyValues | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attention` of queries over own keys and those beside; bfloat16 weights.

    Args:
        packed: [N, T, 3, H, K], queries, keys and values of each sequence without their biases.
        bias: [3, H, K], which the kernel adds: one pass over `packed` less.
        mask: of own keys, as in `attention.KeyValues`.
        beside: what else is looked at.
        interpret: run the kernel as plain JAX, which any device can.

    Returns:
        [N, T, H, K].
    """
    whole = [mask, beside.mask if beside else None]
    length = packed.shape[1]
    masks = tuple(None if x is None else _loadable(x, length) for x in whole)
    pair = (beside.key, beside.value) if beside else ()
    return _attend(packed, bias, pair, masks, interpret)


def _loadable(mask: jax.Array, queries: int) -> jax.Array:
    """bool [N or 1, 1, T or 1, S] -> int8 [N or 1, T, S]."""
    return jnp.broadcast_to(mask[:, 0], (len(mask), queries, mask.shape[-1])).astype(jnp.int8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    packed: jax.Array, bias: jax.Array, beside: tuple, masks: Masks, interpret: bool
) -> jax.Array:
    count, tokens, _, heads, width = packed.shape
    shapes: list[tuple[int, ...]] = [(count, tokens, heads, width)]
    return _call(_forward, (packed, bias, *beside), masks, (), shapes, interpret)[0]


def _attend_and_keep(*arguments: Any):
    return _attend(*arguments), arguments[:-1]


def _attend_transposed(interpret: bool, kept: tuple, given: jax.Array):
    packed, bias, beside, masks = kept
    shapes = [packed.shape, *((len(packed), *x.shape[1:]) for x in beside)]
    arrays = packed, bias, *beside
    to_packed, *apart = _call(_backward, arrays, masks, (given,), shapes, interpret)

    def add_up(gradient: jax.Array, of: jax.Array) -> jax.Array:  # over those that share it
        groups = gradient.reshape(-1, *of.shape)
        return groups.astype(jnp.float32).sum(axis=0).astype(of.dtype)

    to_beside = tuple(add_up(gradient, x) for gradient, x in zip(apart, beside, strict=True))
    return to_packed, add_up(to_packed, bias), to_beside, tuple(None for _ in masks)


_attend.defvjp(_attend_and_keep, _attend_transposed)


def _call(
    body: Any,
    arrays: tuple,
    masks: Masks,
    given: tuple,
    shapes: list[tuple[int, ...]],
    interpret: bool,
) -> list[jax.Array]:
    """`body` as one program for each sequence and head.

    Args:
        arrays: packed, bias, then keys and values beside.
        given, shapes: further arrays, and what is written.
    All but masks and bias are [N or M, T or P, (3,) H, K].
    """
    packed, bias, *beside = arrays
    count, tokens, _, heads, width = packed.shape

    def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        """A head of the sequence n modulo M."""
        rows, between = shape[0], shape[2:-2]
        block = (None, _padded(shape[1]), *between, None, width)
        return pl.BlockSpec(block, lambda n, h: (n % rows, 0, *(0 for _ in between), h, 0))

    def mask_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        block = (None, _padded(shape[1]), _padded(shape[2]))
        return pl.BlockSpec(block, lambda n, _: (n % shape[0], 0, 0))

    there = [mask for mask in masks if mask is not None]
    whole = [packed, *beside, *given]
    lengths = [tokens, *(x.shape[1] for x in beside[:1])]
    kernel = functools.partial(body, lengths=lengths, masked=[m is not None for m in masks])
    longest = max(map(_padded, lengths))
    call = pl.pallas_call(
        kernel,
        grid=(count, heads),
        in_specs=[
            *(mask_spec(mask.shape) for mask in there),
            pl.BlockSpec((len(bias), None, width), lambda _, h: (0, h, 0)),
            *(spec(x.shape) for x in whole),
        ],
        out_specs=[spec(shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct(shape, packed.dtype) for shape in shapes],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4 if longest <= 64 else 8, num_stages=1),
        name=f"short_attention{body.__name__}",
    )
    return call(*there, bias, *whole)


def _padded(length: int) -> int:
    """A power of two, as a GPU's programs have them."""
    return max(LEAST, 1 << (length - 1).bit_length())


def _before(shape: tuple[int, ...], axis: int, length: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < length


def _load(ref: Any, length: int) -> jax.Array:
    """[padded, K], zeros behind `length`."""
    return plgpu.load(ref, mask=_before(ref.shape, 0, length), other=0.0)


def _store(ref: Any, rows: jax.Array, length: int) -> None:
    plgpu.store(ref, rows.astype(ref.dtype), mask=_before(ref.shape, 0, length))


def _weights(refs: list, lengths: list[int], masked: list[bool]) -> tuple:
    """(queries, [(keys, values)], [weights], other refs), own first; a row's weights sum to 1."""
    masks = [refs.pop(0) if there else None for there in masked]
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
        seen = _before(score.shape, 1, length)
        if mask is not None:
            there = seen & _before(score.shape, 0, lengths[0])
            seen = plgpu.load(mask, mask=there, other=0) != 0
        scores.append(jnp.where(seen, score, HIDDEN))
    highest = functools.reduce(jnp.maximum, [x.max(axis=1) for x in scores])
    weights = [jnp.exp(x - highest[:, None]) for x in scores]
    total = functools.reduce(jnp.add, [x.sum(axis=1) for x in weights])
    return query, pairs, [x / total[:, None] for x in weights], refs


def _forward(*refs: Any, lengths: list[int], masked: list[bool]) -> None:
    _, pairs, weights, (out,) = _weights(list(refs), lengths, masked)
    mixed = [plgpu.dot(w.astype(v.dtype), v) for w, (_, v) in zip(weights, pairs, strict=True)]
    _store(out, functools.reduce(jnp.add, mixed), lengths[0])


def _backward(*refs: Any, lengths: list[int], masked: list[bool]) -> None:
    query, pairs, weights, others = _weights(list(refs), lengths, masked)
    given = _load(others[0], lengths[0])
    to_own, *to_beside = others[1:]
    to_weights = [plgpu.dot(given, value, trans_b=True) for _, value in pairs]
    terms = [(w * x).sum(axis=1) for w, x in zip(weights, to_weights, strict=True)]
    mean = functools.reduce(jnp.add, terms)
    to_query_ref, *to_pair = (to_own.at[:, i, :] for i in PARTS)
    outputs = [to_pair, to_beside]
    to_query = []
    for (key, _), w, x, length, (to_key, to_value) in zip(
        pairs, weights, to_weights, lengths, outputs, strict=False
    ):
        to_scores = (w * (x - mean[:, None]) * query.shape[-1] ** -0.5).astype(query.dtype)
        to_query.append(plgpu.dot(to_scores, key))
        _store(to_key, plgpu.dot(to_scores, query, trans_a=True), length)
        _store(to_value, plgpu.dot(w.astype(given.dtype), given, trans_a=True), length)
    _store(to_query_ref, functools.reduce(jnp.add, to_query), lengths[0])
