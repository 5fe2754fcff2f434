"""Softmax attention of short sequences on an NVIDIA GPU, in one piece: a Pallas kernel.

A frame of ViT-B/32 has 50 tokens: one head's scores fit into the registers of one program, which
reads queries, keys and values once and writes what comes out. What many sequences look at is read
where it lies, so nothing is appended to each one's own keys. The backward pass computes the
weights again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from vop_jax.clip.attention import Keys

LONGEST = 64  # tokens of a sequence
LEAST = 16  # rows of a matrix that a GPU multiplies


def takes(query: jax.Array, *parts: Keys) -> bool:
    """Whether the kernel is made for these; a mask only where it is of bfloat16."""
    lengths = [query.shape[1], *(part.key.shape[1] for part in parts)]
    width = query.shape[-1]
    return max(lengths) <= LONGEST and 16 <= width <= 128 and width & (width - 1) == 0


def attention(query: jax.Array, *parts: Keys, interpret: bool = False) -> jax.Array:
    """As `clip.attention.attention`, for what it `takes`; weights meet values in their dtype.

    Args:
        interpret: run the kernel as plain JAX, which any device can.
    """
    masks = tuple(
        None if part.mask is None else _whole_mask(part.mask, query.shape[1], part.key.shape[1])
        for part in parts
    )
    pairs = tuple((part.key, part.value) for part in parts)
    return _attend(query, pairs, masks, interpret)


def _whole_mask(mask: jax.Array, queries: int, keys: int) -> jax.Array:
    """bool [N or 1, 1, T, S] -> [N or 1, T, S]; int8, which a kernel can load."""
    return jnp.broadcast_to(mask[:, 0], (len(mask), queries, keys)).astype(jnp.int8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(query: jax.Array, pairs: tuple, masks: tuple, interpret: bool) -> jax.Array:
    return _call(_forward, query, pairs, masks, (), ["query"], interpret)[0]


def _attend_and_keep(query: jax.Array, pairs: tuple, masks: tuple, interpret: bool):
    return _attend(query, pairs, masks, interpret), (query, pairs, masks)


def _attend_transposed(interpret: bool, kept: tuple, given: jax.Array):
    query, pairs, masks = kept
    outputs = ["query", *("pair" for _ in pairs for _ in "kv")]
    to_query, *to_parts = _call(_backward, query, pairs, masks, (given,), outputs, interpret)

    def add_up(gradient: jax.Array, of: jax.Array) -> jax.Array:  # over those that share it
        if len(of) == len(gradient):
            return gradient
        groups = gradient.reshape(-1, len(of), *gradient.shape[1:])
        return groups.astype(jnp.float32).sum(axis=0).astype(of.dtype)

    flat = [x for pair in pairs for x in pair]
    summed = iter(add_up(gradient, x) for gradient, x in zip(to_parts, flat, strict=True))
    return to_query, tuple((next(summed), next(summed)) for _ in pairs), tuple(None for _ in masks)


_attend.defvjp(_attend_and_keep, _attend_transposed)


def _call(
    body: Any,
    query: jax.Array,
    pairs: tuple,
    masks: tuple,
    given: tuple,
    outputs: list[str],
    interpret: bool,
) -> list[jax.Array]:
    """One program for each sequence and head; `outputs` are shaped as query or as own pairs."""
    count, tokens, heads, width = query.shape

    def block(length: int, rows: int) -> pl.BlockSpec:
        shape = (None, _padded(length), None, width)
        return pl.BlockSpec(shape, lambda n, h: (jax.lax.rem(n, rows), 0, h, 0))

    arrays, specs, shapes = [query], [block(tokens, count)], []
    for key, value in pairs:
        arrays += [key, value]
        specs += [block(key.shape[1], len(key))] * 2
    for (key, _), mask in zip(pairs, masks, strict=True):
        if mask is not None:
            arrays.append(mask)
            shape = (None, _padded(tokens), _padded(key.shape[1]))
            rows = len(mask)
            specs.append(pl.BlockSpec(shape, lambda n, h, rows=rows: (jax.lax.rem(n, rows), 0, 0)))
    arrays += given
    specs += [block(tokens, count)] * len(given)
    lengths = iter(x.shape[1] for pair in pairs for x in pair)
    out_specs = []
    for output in outputs:
        length = tokens if output == "query" else next(lengths)
        shapes.append(jax.ShapeDtypeStruct((count, length, heads, width), query.dtype))
        out_specs.append(block(length, count))
    kernel = functools.partial(
        body,
        tokens=tokens,
        keys=[key.shape[1] for key, _ in pairs],
        masked=[mask is not None for mask in masks],
    )
    call = pl.pallas_call(
        kernel,
        grid=(count, heads),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name=body.__name__.strip("_") + "_of_short_attention",
    )
    return call(*arrays)


def _padded(length: int) -> int:
    """A power of two, as a GPU's programs have them."""
    return max(LEAST, 1 << (length - 1).bit_length())


def _rows(ref: Any, length: int) -> jax.Array:
    """[padded, K], zeros behind `length`."""
    there = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0) < length
    return plgpu.load(ref, mask=there, other=0.0)


def _write(ref: Any, rows: jax.Array, length: int) -> None:
    there = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0) < length
    plgpu.store(ref, rows.astype(ref.dtype), mask=there)


def _weights(refs: list, tokens: int, keys: list[int], masked: list[bool]) -> tuple:
    """(queries, [(keys, values)], [weights, their rows' sum over all parts 1], other refs)."""
    query = _rows(refs[0], tokens)
    pairs = [
        (_rows(refs[1 + 2 * i], length), _rows(refs[2 + 2 * i], length))
        for i, length in enumerate(keys)
    ]
    others = list(refs[1 + 2 * len(keys) :])
    scores = []
    for (key, _), length, has_mask in zip(pairs, keys, masked, strict=True):
        score = plgpu.dot(query, key, trans_b=True) * query.shape[-1] ** -0.5
        seen = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1) < length
        if has_mask:
            ref = others.pop(0)
            there = seen & (jax.lax.broadcasted_iota(jnp.int32, score.shape, 0) < tokens)
            seen = plgpu.load(ref, mask=there, other=0) != 0
        scores.append(jnp.where(seen, score, -1e30))  # not -inf: of rows behind the last, all
    highest = functools.reduce(jnp.maximum, [x.max(axis=1) for x in scores])
    weights = [jnp.exp(x - highest[:, None]) for x in scores]
    total = functools.reduce(jnp.add, [x.sum(axis=1) for x in weights])
    return query, pairs, [x / total[:, None] for x in weights], others


def _forward(*refs: Any, tokens: int, keys: list[int], masked: list[bool]) -> None:
    _, pairs, weights, (out,) = _weights(list(refs), tokens, keys, masked)
    mixed = [plgpu.dot(w.astype(v.dtype), v) for w, (_, v) in zip(weights, pairs, strict=True)]
    _write(out, functools.reduce(jnp.add, mixed), tokens)


def _backward(*refs: Any, tokens: int, keys: list[int], masked: list[bool]) -> None:
    query, pairs, weights, others = _weights(list(refs), tokens, keys, masked)
    given = _rows(others[0], tokens)
    to_query_ref, *to_parts = others[1:]
    to_weights = [plgpu.dot(given, value, trans_b=True) for _, value in pairs]
    mean = functools.reduce(
        jnp.add, [(w * x).sum(axis=1) for w, x in zip(weights, to_weights, strict=True)]
    )
    to_query = []
    for i, (w, x) in enumerate(zip(weights, to_weights, strict=True)):
        key, _ = pairs[i]
        to_scores = w * (x - mean[:, None]) * query.shape[-1] ** -0.5
        to_scores = to_scores.astype(query.dtype)
        to_query.append(plgpu.dot(to_scores, key))
        _write(to_parts[2 * i], plgpu.dot(to_scores, query, trans_a=True), keys[i])
        _write(to_parts[2 * i + 1], plgpu.dot(w.astype(given.dtype), given, trans_a=True), keys[i])
    _write(to_query_ref, functools.reduce(jnp.add, to_query), tokens)
