"""The transformer block of CLIP: attention, MLP, and the places where a method adds to them.

Letters: N sequences, T tokens of each, Q of them queries, P prompt tokens, D width, H heads.
Parameter names and shapes are those of scenic's port (`attn/{query,key,value,out}` with
kernels [D, H, D/H]), so that exchange with it is a rename.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.kernels import products, splash_attention
from vop_jax.clip.kernels.attention import (
    KeyValues,
    attention,
    attention_in_blocks,
    concatenate,
)
from vop_jax.clip.kernels.layer_norm import LayerNorm

# How attention is computed. "xla": plain JAX; "blocks": `attention_in_blocks`; "cudnn": that of
# `jax.nn`; "splash": `splash_attention`, on TPUs; "fused": `fused_attention` for short sequences on
# NVIDIA's GPUs, else "cudnn", or "xla" under a mask, and a kernel for layer norms' backward pass.
Kernel = Literal["xla", "blocks", "cudnn", "splash", "fused"]
ACROSS_FRAMES: tuple[Kernel, ...] = ("blocks", "splash")  # faster for long sequences only

# Which tokens of [N, T, D] are queries: the first so many, the one at [N], or all (None).
QueryPositions = int | jax.Array | None
Branch = Callable[[jax.Array], jax.Array]  # [N, Q, D] -> [N, Q, D]


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU: x * sigmoid(1.702 x), rounded once."""
    if x.dtype == jnp.float32:
        return x * jax.nn.sigmoid(1.702 * x)
    wide = x.astype(jnp.float32)
    return (wide * _sigmoid(1.702 * wide)).astype(x.dtype)


@jax.custom_jvp
def _sigmoid(x: jax.Array) -> jax.Array:
    """As (1 + tanh(x / 2)) / 2 on a CPU, which computes that in half the time."""

    def cpu(x: jax.Array) -> jax.Array:
        return 0.5 + 0.5 * jnp.tanh(0.5 * x)

    return jax.lax.platform_dependent(x, cpu=cpu, default=jax.nn.sigmoid)


_sigmoid.defjvps(lambda tangent, out, x: tangent * out * (1 - out))


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, as in open_clip's LAION models."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}


def take_queries(x: jax.Array, positions: QueryPositions) -> jax.Array:
    """[N, T, D] -> [N, Q, D]: the tokens at the query positions."""
    if positions is None:
        return x
    if isinstance(positions, int):
        return x[:, :positions]
    return x[jnp.arange(x.shape[0]), positions][:, None]


class PromptTokens(NamedTuple):
    """Prompt tokens that serve as extra keys and values only.

    Attributes:
        tokens: [M, P, D]; M divides N, and sequence n uses the prompts n modulo M.
        mask: bool [N, T, P], which prompts a token attends to; None: all.
    """

    tokens: jax.Array
    mask: jax.Array | None = None


class Attention(nn.Module):
    """Multi-head attention [N, T, D] -> [N, Q, D]; softmax in float32.

    The queries attend to all T tokens and to the prompt tokens.
    """

    width: int
    heads: int
    causal: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        head_shape = (self.heads, self.width // self.heads)
        self.query = products.DenseGeneral(head_shape, dtype=self.dtype)
        self.key = products.DenseGeneral(head_shape, dtype=self.dtype)
        self.value = products.DenseGeneral(head_shape, dtype=self.dtype)
        self.out = products.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype)

    def __call__(
        self,
        x: jax.Array,
        prompts: PromptTokens | None = None,
        kernel: Kernel = "xla",
        query_positions: QueryPositions = None,
    ) -> jax.Array:
        causal_mask = self._causal_mask(x.shape[1], query_positions)
        extra = []
        if prompts is not None:
            tokens, mask = prompts
            mask = None if mask is None else take_queries(mask, query_positions)[:, None]
            extra.append(KeyValues(self.key(tokens), self.value(tokens), mask))
        if query_positions is not None:
            kernel = "xla"  # few queries have few attention weights
        if kernel == "fused":
            # Not every platform's jaxlib has what the kernel needs.
            from vop_jax.clip.kernels import fused_attention

            lengths = [x.shape[1], *(part.key.shape[1] for part in extra)]
            supported = fused_attention.supports(lengths, self.width // self.heads)
            # During initialisation each layer must create its own parameters.
            if supported and not self.is_initializing():
                packed, bias = self._packed(x)
                return self.out(fused_attention.attention(packed, bias, causal_mask, *extra))
            kernel = "xla" if self.causal else "cudnn"
        q = self.query(take_queries(x, query_positions))  # [N, Q, H, D/H]
        parts = [KeyValues(self.key(x), self.value(x), causal_mask), *extra]
        if kernel == "xla":
            return self.out(attention(q, *parts))
        if any(part.mask is not None for part in parts):
            raise ValueError(f"attention by {kernel} has no mask")
        k, v = concatenate(x.shape[0], *parts)
        if kernel == "blocks":
            return self.out(attention_in_blocks(q, k, v))
        if kernel == "splash":
            return self.out(splash_attention.attention(q, k, v))
        return self.out(jax.nn.dot_product_attention(q, k, v, implementation=kernel))

    def _packed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """([N, T, 3, H, D/H], [3, H, D/H]): queries, keys, values by one product, their biases."""
        layers = [layer.variables["params"] for layer in (self.query, self.key, self.value)]
        kernels = [jnp.asarray(p["kernel"], self.dtype).reshape(self.width, -1) for p in layers]
        packed = products.linear(x.astype(self.dtype), jnp.concatenate(kernels, axis=1))
        bias = jnp.stack([jnp.asarray(p["bias"], self.dtype) for p in layers])
        return packed.reshape(*x.shape[:2], *bias.shape), bias

    def _causal_mask(self, length: int, query_positions: QueryPositions) -> jax.Array | None:
        """bool [N or 1, 1, Q, T]: a query attends to no later token; None without causality."""
        if not self.causal:
            return None
        positions = jnp.arange(length)
        if query_positions is None or isinstance(query_positions, int):
            queries = positions[None, :query_positions]
        else:
            queries = query_positions[:, None]
        return positions[None, None, None] <= queries[:, None, :, None]


class Mlp(nn.Module):
    """Two dense layers [..., D] -> [..., D], `hidden` wide between them (default: 4 D)."""

    width: int
    activation: str
    dtype: jnp.dtype = jnp.float32
    hidden: int | None = None

    def setup(self):
        self.c_fc = products.Dense(self.hidden or 4 * self.width, dtype=self.dtype)
        self.c_proj = products.Dense(self.width, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        # The backward pass computes the activation again: its parts are as wide as its input.
        activate = jax.checkpoint(ACTIVATIONS[self.activation])
        return self.c_proj(activate(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm residual block [N, T, D] -> [N, Q, D].

        x = x + attention(ln_1(x), prompts) + attn_branch(ln_1(x))
        x = x + mlp(ln_2(x)) + mlp_branch(ln_2(x))

    Branches are parallel adapters. Prompt tokens pass `ln_1`, then become keys and values and
    nothing else. In the last block few tokens are used, so it computes only those: at ViT-B/32
    this saves a fifteenth of all FLOPs.
    """

    width: int
    heads: int
    activation: str
    causal: bool = False
    dtype: jnp.dtype = jnp.float32
    hidden: int | None = None

    def setup(self):
        self.ln_1 = LayerNorm(self.dtype)
        self.attn = Attention(self.width, self.heads, self.causal, self.dtype)
        self.ln_2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.width, self.activation, self.dtype, self.hidden)

    def __call__(
        self,
        x: jax.Array,
        attn_branch: Branch | None = None,
        mlp_branch: Branch | None = None,
        prompts: PromptTokens | None = None,
        kernel: Kernel = "xla",
        query_positions: QueryPositions = None,
    ) -> jax.Array:
        fused = kernel == "fused"
        x, h = self.ln_1.branch(x, fused)
        if prompts is not None:
            prompts = prompts._replace(tokens=self.ln_1(prompts.tokens))
        attended = self.attn(h, prompts, kernel, query_positions)
        x, h = take_queries(x, query_positions), take_queries(h, query_positions)
        x = x + attended + (attn_branch(h) if attn_branch else 0)
        x, h = self.ln_2.branch(x, fused)
        return x + self.mlp(h) + (mlp_branch(h) if mlp_branch else 0)


class Transformer(nn.Module):
    """A stack of blocks; callers run `blocks` one by one."""

    width: int
    layers: int
    heads: int
    activation: str
    causal: bool = False
    dtype: jnp.dtype = jnp.float32
    hidden: int | None = None

    def setup(self):
        sizes = self.width, self.heads, self.activation, self.causal, self.dtype, self.hidden
        self.blocks = [Block(*sizes, name=f"resblocks.{i}") for i in range(self.layers)]
