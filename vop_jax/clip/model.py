"""Plain CLIP: the two towers run end to end, nothing added."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.towers import TextTower, VisionTower
from vop_jax.config.clip import ClipConfig


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
        # log(1 / 0.07), CLIP's own start; every converted model brings its learned value.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6593), ())

    def encode_image(self, frames: jax.Array) -> jax.Array:
        """uint8 [N, S, S, 3] -> unit rows [N, E]."""
        x = self.visual.ln_pre(self.visual.embed(frames))
        *blocks, last = self.visual.blocks
        for block in blocks:
            x = block(x)
        x = last(x, reads=1)  # CLS
        return unit(self.visual.project(x[:, 0]))

    def encode_text(self, ids: jax.Array) -> jax.Array:
        """int32 [N, T] -> unit rows [N, E]; read at EOT, the largest id."""
        x = self.text.embed(ids) + self.text.positions(jnp.arange(ids.shape[1])[None])
        *blocks, last = self.text.blocks
        for block in blocks:
            x = block(x)
        x = last(x, reads=ids.argmax(axis=-1))
        return unit(self.text.project(x[:, 0]))

    def temperature(self) -> jax.Array:
        """The factor on similarities; its bound is the optimizer's, see `training.step`."""
        return jnp.exp(self.logit_scale)

    def __call__(self, frames: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_image(frames), self.encode_text(ids)
