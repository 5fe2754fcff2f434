"""The transformer block of CLIP.

Parameter names and shapes are those of scenic's port (`attn/{query,key,value,out}` with
kernels [D, H, D/H]), so that exchange with it is a rename.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.attention import attention, attention_in_blocks

LAYER_NORM_EPS = 1e-5

Kernel = Literal["xla", "cudnn", "blocks"]  # of attention
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


def layer_norm(dtype: jnp.dtype) -> nn.LayerNorm:
    """LayerNorm with float32 statistics whatever the compute dtype."""
    # The fast variance E[x^2] - E[x]^2 loses digits that parity with PyTorch needs.
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype, use_fast_variance=False)


def read(x: jax.Array, reads: Reads) -> jax.Array:
    """[N, T, D] -> [N, R, D], the tokens that are read."""
    if reads is None:
        return x
    return x[:, :reads] if isinstance(reads, int) else x[jnp.arange(x.shape[0]), reads][:, None]


class Attention(nn.Module):
    """Multi-head self-attention [N, T, D] -> [N, R, D]; softmax in float32.

    All T tokens are looked at, by the R that are read.
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

    def __call__(self, x: jax.Array, kernel: Kernel = "xla", reads: Reads = None) -> jax.Array:
        q, k, v = self.query(read(x, reads)), self.key(x), self.value(x)  # [N, T, H, D/H]
        if kernel == "xla":
            return self.out(attention(q, k, v, self._mask(x, reads)))
        if self.causal:
            raise ValueError(f"attention by {kernel} has no causal mask")
        if kernel == "blocks":
            return self.out(attention_in_blocks(q, k, v))
        return self.out(jax.nn.dot_product_attention(q, k, v, implementation=kernel))

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
    """Pre-norm residual block [N, T, D] -> [N, R, D].

    `attn_branch` and `mlp_branch` read the same normalised input as the attention and the
    MLP, and what they return is added beside theirs (a parallel adapter). `kernel` is "xla",
    plain JAX; "blocks", see `clip.attention`; or an implementation of
    `jax.nn.dot_product_attention`. Of the last block few tokens are read, so it need not make
    the others: at ViT-B/32 that is a fifteenth of all FLOPs.
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
        reads: Reads = None,
    ) -> jax.Array:
        h = self.ln_1(x)
        x, attended = read(x, reads), self.attn(h, kernel, reads)
        x = x + attended + (attn_branch(read(h, reads)) if attn_branch else 0)
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
