"""Adapters: a small bottleneck in parallel to the attention or to the MLP of every block."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.kernels import products
from vop_jax.config.clip import ClipConfig
from vop_jax.tuning.methods import MethodConfig


class Adapter(nn.Module):
    """Two dense layers with a narrow middle, [..., D] -> [..., D]; initially zero."""

    width: int
    bottleneck: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.down = products.Dense(self.bottleneck, dtype=self.dtype)
        self.up = products.Dense(self.width, kernel_init=nn.initializers.zeros, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(nn.relu(self.down(x)))


class Adapters(nn.Module):
    """The adapters of both towers."""

    method: MethodConfig
    clip_config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        def tower(name: str, depth: int, width: int) -> list[Adapter]:
            layers = self.method.layers(depth) if self.method.has_branch(name) else ()
            return [Adapter(width, self.method.adapter_width, self.dtype) for _ in layers]

        c = self.clip_config
        self.visual = tower("visual", c.vision_layers, c.vision_width)
        self.text = tower("text", c.text_layers, c.text_width)

    def at(self, tower: str, layer: int) -> dict[str, Adapter]:
        """{"attn_branch" or "mlp_branch": adapter} of a layer, from 0; {} where it has none."""
        adapters = {"visual": self.visual, "text": self.text}[tower]
        index = layer - (self.method.first_layer - 1)
        if not 0 <= index < len(adapters):
            return {}
        return {f"{self.method.parts.adapter}_branch": adapters[index]}
