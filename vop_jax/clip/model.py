"""CLIP with a ViT: two towers that expose their parts, and plain CLIP composed of them.

A tower is `embed`, `blocks`, `project`. `Clip` runs them end to end; `vop_jax.model` runs the
same parts and adds prompts or adapters between them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.kernels import products
from vop_jax.clip.kernels.layer_norm import LayerNorm
from vop_jax.clip.layers import Block, Transformer
from vop_jax.config.clip import ClipConfig

# CLIP's channel statistics for RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(frames: jax.Array) -> jax.Array:
    """uint8 RGB [..., 3] -> float32 (x / 255 - mean) / std.

    Raises:
        TypeError: the frames are not uint8.
    """
    if frames.dtype != jnp.uint8:
        raise TypeError(f"frames are uint8 RGB, not {frames.dtype}")
    # One multiply-add per channel.
    shape = (1,) * (frames.ndim - 1) + (3,)
    mean = jnp.asarray(PIXEL_MEAN, jnp.float32).reshape(shape)
    std = jnp.asarray(PIXEL_STD, jnp.float32).reshape(shape)
    return frames.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def patches(x: jax.Array, size: int) -> jax.Array:
    """Images [N, S, S, 3] -> [N, G, size * size * 3], the patches row by row."""
    count, side = x.shape[0], x.shape[1] // size  # pixels that fill no patch are dropped
    x = x[:, : side * size, : side * size].reshape(count, side, size, side, size, 3)
    return x.swapaxes(2, 3).reshape(count, side * side, size * size * 3)


class PatchEmbedding(nn.Module):
    """Images [N, S, S, 3] -> [N, G, D]: each patch through one linear map without bias."""

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        shape = (c.patch_size, c.patch_size, 3, c.vision_width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        # One matrix product over patches: as a convolution it takes an H200 5 ms of a step
        # instead of 0.3, and two CPU cores four times as long.
        rows = patches(x.astype(self.dtype), c.patch_size)
        return products.linear(rows, jnp.asarray(kernel, self.dtype).reshape(-1, c.vision_width))


class VisionTower(nn.Module):
    """Vision transformer: `embed`, `ln_pre`, `blocks`, `project`."""

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, width = self.config, self.config.vision_width
        normal = nn.initializers.normal(width**-0.5)
        self.conv1 = PatchEmbedding(c, self.dtype)
        self.class_embedding = self.param("class_embedding", normal, (width,))
        positions = (c.patches + 1, width)
        self.positional_embedding = self.param("positional_embedding", normal, positions)
        self.ln_pre = LayerNorm(self.dtype)
        self.transformer = Transformer(
            width,
            c.vision_layers,
            c.vision_heads,
            c.activation,
            dtype=self.dtype,
            hidden=c.vision_mlp,
        )
        self.ln_post = LayerNorm(self.dtype)
        self.proj = products.Dense(c.embed_dim, use_bias=False, dtype=self.dtype)

    def embed(self, frames: jax.Array) -> jax.Array:
        """uint8 [N, S, S, 3] -> [N, 1 + G, D]: CLS and patches with positions, before `ln_pre`."""
        x = self.conv1(normalize_pixels(frames))  # [N, G, D]
        cls = jnp.broadcast_to(self.class_embedding.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1)
        return x + self.positional_embedding.astype(x.dtype)[None]

    @property
    def blocks(self) -> list[Block]:
        return self.transformer.blocks

    def project(self, cls: jax.Array) -> jax.Array:
        """[..., D] -> [..., E]: the CLS token into the joint space, not normalised."""
        return self.proj(self.ln_post(cls))


class TextTower(nn.Module):
    """Causal text transformer: `embed`, `positions`, `blocks`, `project`."""

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, width, normal = self.config, self.config.text_width, nn.initializers.normal
        self.token_embedding = nn.Embed(
            c.vocab_size, width, embedding_init=normal(0.02), dtype=self.dtype
        )
        self.positional_embedding = self.param(
            "positional_embedding", normal(0.01), (c.context_length, width)
        )
        self.transformer = Transformer(
            width,
            c.text_layers,
            c.text_heads,
            c.activation,
            causal=True,
            dtype=self.dtype,
            hidden=c.text_mlp,
        )
        self.ln_final = LayerNorm(self.dtype)
        self.text_projection = products.Dense(c.embed_dim, use_bias=False, dtype=self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32 [N, T] -> [N, T, D]: token embeddings without positions."""
        return self.token_embedding(ids)

    def positions(self, indices: jax.Array) -> jax.Array:
        """int32 [...] -> [..., D]: the position embeddings at these indices."""
        return jnp.asarray(self.positional_embedding, self.dtype)[indices]

    @property
    def blocks(self) -> list[Block]:
        return self.transformer.blocks

    def project(self, eot: jax.Array) -> jax.Array:
        """[..., D] -> [..., E]: the EOT token into the joint space, not normalised."""
        return self.text_projection(self.ln_final(eot))


def unit(x: jax.Array) -> jax.Array:
    """[..., E] -> float32 rows of Euclidean length one."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Clip(nn.Module):
    """CLIP with a ViT; `visual`, `text` and `logit_scale` are its parameters."""

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.visual = VisionTower(self.config, self.dtype)
        self.text = TextTower(self.config, self.dtype)
        # log(1 / 0.07), CLIP's initial value; every converted model has its learned value.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6593), ())

    def encode_image(self, frames: jax.Array) -> jax.Array:
        """uint8 [N, S, S, 3] -> unit rows [N, E]."""
        x = self.visual.ln_pre(self.visual.embed(frames))
        *blocks, last = self.visual.blocks
        for block in blocks:
            x = block(x)
        x = last(x, query_positions=1)  # CLS
        return unit(self.visual.project(x[:, 0]))

    def encode_text(self, ids: jax.Array) -> jax.Array:
        """int32 [N, T] -> unit rows [N, E]: the feature at EOT, which is the largest id."""
        x = self.text.embed(ids) + self.text.positions(jnp.arange(ids.shape[1])[None])
        *blocks, last = self.text.blocks
        for block in blocks:
            x = block(x)
        x = last(x, query_positions=ids.argmax(axis=-1))
        return unit(self.text.project(x[:, 0]))

    def temperature(self) -> jax.Array:
        """The scale of similarities; `training.step` bounds it."""
        return jnp.exp(self.logit_scale)

    def __call__(self, frames: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_image(frames), self.encode_text(ids)
