"""The transformer block of CLIP.

Parameter names and shapes are those of scenic's port (`attn/{query,key,value,out}` with
kernels [D, H, D/H]), so that exchange with it is a rename.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.attention import attention_in_blocks

LAYER_NORM_EPS = 1e-5

Kernel = Literal["xla", "cudnn", "blocks"]  # of attention


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


def layer_norm(dtype: jnp.dtype) -> nn.LayerNorm:
    """LayerNorm with float32 statistics whatever the compute dtype."""
    # The fast variance E[x^2] - E[x]^2 loses digits that parity with PyTorch needs.
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype, use_fast_variance=False)


class Attention(nn.Module):
    """Multi-head self-attention [..., T, D] -> [..., T, D]; softmax in float32."""

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

    def __call__(self, x: jax.Array, kernel: Kernel = "xla") -> jax.Array:
        q, k, v = self.query(x), self.key(x), self.value(x)  # [N, T, H, D/H]
        if kernel == "blocks":
            if self.causal:
                raise ValueError("attention in blocks has no causal mask")
            return self.out(attention_in_blocks(q, k, v))
        attended = jax.nn.dot_product_attention(
            q, k, v, is_causal=self.causal, implementation=kernel
        )
        return self.out(attended)


class Mlp(nn.Module):
    """Two dense layers, four times as wide inside: [..., D] -> [..., D]."""

    width: int
    activation: str
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.c_fc = nn.Dense(4 * self.width, dtype=self.dtype)
        self.c_proj = nn.Dense(self.width, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


Branch = Callable[[jax.Array], jax.Array]  # [N, T, D] -> [N, T, D]


class Block(nn.Module):
    """Pre-norm residual block [N, T, D] -> [N, T, D].

    `attn_branch` and `mlp_branch` read the same normalised input as the attention and the
    MLP, and what they return is added beside theirs (a parallel adapter). `kernel` is an
    implementation of `jax.nn.dot_product_attention`, or "blocks", see `clip.attention`.
    """

    width: int
    heads: int
    activation: str
    causal: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.ln_1 = layer_norm(self.dtype)
        self.attn = Attention(self.width, self.heads, self.causal, self.dtype)
        self.ln_2 = layer_norm(self.dtype)
        self.mlp = Mlp(self.width, self.activation, self.dtype)

    def __call__(
        self,
        x: jax.Array,
        attn_branch: Branch | None = None,
        mlp_branch: Branch | None = None,
        kernel: Kernel = "xla",
    ) -> jax.Array:
        h = self.ln_1(x)
        x = x + self.attn(h, kernel) + (attn_branch(h) if attn_branch else 0)
        h = self.ln_2(x)
        return x + self.mlp(h) + (mlp_branch(h) if mlp_branch else 0)


class Transformer(nn.Module):
    """The stack of blocks, handed out one by one as `blocks`."""

    width: int
    layers: int
    heads: int
    activation: str
    causal: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.blocks = [
            Block(
                self.width,
                self.heads,
                self.activation,
                self.causal,
                self.dtype,
                name=f"resblocks.{i}",
            )
            for i in range(self.layers)
        ]
