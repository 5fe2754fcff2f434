"""The transformer block of CLIP.

Parameter names and shapes are those of scenic's port (`attn/{query,key,value,out}` with
kernels [D, H, D/H]), so that exchange with it is a rename.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.kernels import splash_attention
from vop_jax.clip.kernels.attention import Keys, attention, attention_in_blocks, joined
from vop_jax.clip.kernels.layer_norm import LayerNorm

# Of attention. "xla": plain JAX; "blocks": see `clip.attention`; "cudnn": of `jax.nn`; "splash": on
# TPUs, see `clip.splash`; "fused": on NVIDIA's GPUs `clip.short` where sequences are short, else
# "cudnn", or "xla" under a mask; and the kernel of layer norms' backward pass.
Kernel = Literal["xla", "blocks", "cudnn", "splash", "fused"]
ACROSS_FRAMES: tuple[Kernel, ...] = ("blocks", "splash")  # pay for long sequences alone
# The tokens of [N, T, D] that somebody reads: the first so many, the one at [N], or all.
Reads = int | jax.Array | None


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, as in open_clip's LAION models."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}


def read(x: jax.Array, reads: Reads) -> jax.Array:
    """[N, T, D] -> [N, R, D], the tokens that are read."""
    if reads is None:
        return x
    return x[:, :reads] if isinstance(reads, int) else x[jnp.arange(x.shape[0]), reads][:, None]


class Beside(NamedTuple):
    """Tokens beside a sequence: it looks at them, they look at nothing and nobody reads them.

    Attributes:
        tokens: [M, P, D]; M divides N, and sequence n of [N, T, D] has those of n modulo M.
        seen: bool [N, T, P], which of them a token looks at; None: all.
    """

    tokens: jax.Array
    seen: jax.Array | None = None


class Attention(nn.Module):
    """Multi-head attention [N, T, D] -> [N, R, D]; softmax in float32.

    All T tokens, and those beside them, are looked at by the R that are read.
    """

    width: int
    heads: int
    causal: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        head_shape = (self.heads, self.width // self.heads)
        self.query = nn.DenseGeneral(head_shape, dtype=self.dtype)
        self.key = nn.DenseGeneral(head_shape, dtype=self.dtype)
        self.value = nn.DenseGeneral(head_shape, dtype=self.dtype)
        self.out = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype)

    def __call__(
        self,
        x: jax.Array,
        beside: Beside | None = None,
        kernel: Kernel = "xla",
        reads: Reads = None,
    ) -> jax.Array:
        mask = self._mask(x, reads)
        also = []
        if beside is not None:
            tokens, seen = beside
            seen = None if seen is None else read(seen, reads)[:, None]
            also.append(Keys(self.key(tokens), self.value(tokens), seen))
        if reads is not None:
            kernel = "xla"  # the weights of a few queries are few
        if kernel == "fused":
            from vop_jax.clip.kernels import (
                fused_attention,  # not every platform's jaxlib has what it needs
            )

            lengths = [x.shape[1], *(keys.key.shape[1] for keys in also)]
            # While parameters are made, each part makes its own.
            if not self.is_initializing() and fused_attention.takes(
                lengths, self.width // self.heads
            ):
                return self.out(fused_attention.attention(*self._packed(x), mask, *also))
            kernel = "xla" if self.causal else "cudnn"
        q = self.query(read(x, reads))  # [N, R, H, D/H]
        parts = [Keys(self.key(x), self.value(x), mask), *also]
        if kernel == "xla":
            return self.out(attention(q, *parts))
        if any(part.mask is not None for part in parts):
            raise ValueError(f"attention by {kernel} has no mask")
        k, v = joined(x.shape[0], *parts)
        if kernel == "blocks":
            return self.out(attention_in_blocks(q, k, v))
        if kernel == "splash":
            return self.out(splash_attention.attention(q, k, v))
        return self.out(jax.nn.dot_product_attention(q, k, v, implementation=kernel))

    def _packed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries, keys, values [N, T, 3, H, D/H] by one product, and their biases to be added."""
        parts = [part.variables["params"] for part in (self.query, self.key, self.value)]
        kernels = [jnp.asarray(p["kernel"], self.dtype).reshape(self.width, -1) for p in parts]
        packed = x.astype(self.dtype) @ jnp.concatenate(kernels, axis=1)
        bias = jnp.stack([jnp.asarray(p["bias"], self.dtype) for p in parts])
        return packed.reshape(*x.shape[:2], *bias.shape), bias

    def _mask(self, x: jax.Array, reads: Reads) -> jax.Array | None:
        """[N or 1, 1, R, T]: in a causal layer a token looks at none behind it."""
        if not self.causal:
            return None
        positions = jnp.arange(x.shape[1])
        if reads is None or isinstance(reads, int):
            readers = positions[None, :reads]
        else:
            readers = reads[:, None]
        return positions[None, None, None] <= readers[:, None, :, None]


class Mlp(nn.Module):
    """Two dense layers, `hidden` wide inside or four times the width: [..., D] -> [..., D]."""

    width: int
    activation: str
    dtype: jnp.dtype = jnp.float32
    hidden: int | None = None

    def setup(self):
        self.c_fc = nn.Dense(self.hidden or 4 * self.width, dtype=self.dtype)
        self.c_proj = nn.Dense(self.width, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        # The backward pass works it out again from what goes in: kept, its parts are as wide.
        activate = jax.checkpoint(ACTIVATIONS[self.activation])
        return self.c_proj(activate(self.c_fc(x)))


Branch = Callable[[jax.Array], jax.Array]  # [N, T, D] -> [N, T, D]


class Block(nn.Module):
    """Pre-norm residual block [N, T, D] -> [N, R, D].

    `attn_branch` and `mlp_branch` read the same normalised input as the attention and the
    MLP, and what they return is added beside theirs (a parallel adapter). `beside` are tokens
    that are looked at and not read, so that the block makes their keys and values and no more.
    Of the last block few tokens are read, so it need not make the others: at ViT-B/32 that is a
    fifteenth of all FLOPs.
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
        beside: Beside | None = None,
        kernel: Kernel = "xla",
        reads: Reads = None,
    ) -> jax.Array:
        fused = kernel == "fused"
        x, h = self.ln_1.branch(x, fused)
        if beside is not None:
            beside = beside._replace(tokens=self.ln_1(beside.tokens))
        x, attended = read(x, reads), self.attn(h, beside, kernel, reads)
        x = x + attended + (attn_branch(read(h, reads)) if attn_branch else 0)
        x, h = self.ln_2.branch(x, fused)
        return x + self.mlp(h) + (mlp_branch(h) if mlp_branch else 0)


class Transformer(nn.Module):
    """The stack of blocks, handed out one by one as `blocks`."""

    width: int
    layers: int
    heads: int
    activation: str
    causal: bool = False
    dtype: jnp.dtype = jnp.float32
    hidden: int | None = None

    def setup(self):
        self.blocks = [
            Block(
                self.width,
                self.heads,
                self.activation,
                self.causal,
                self.dtype,
                self.hidden,
                name=f"resblocks.{i}",
            )
            for i in range(self.layers)
        ]
