"""Text and video into one space: CLIP's parts with the tuning parts. This is the paper."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.config import ClipConfig
from vop_jax.clip.model import Clip, unit
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompts import Prompts, TextLayout, set_visual_prompts


class TextVideoModel(nn.Module):
    """CLIP under `clip`, what a method adds to it under `prompts`."""

    clip_config: ClipConfig
    method: MethodConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.clip = Clip(self.clip_config, self.dtype)
        if self.method.prompts:
            self.prompts = Prompts(self.method, self.clip_config)

    def encode_video(self, frames: jax.Array) -> jax.Array:
        """uint8 [B, F, S, S, 3] -> unit rows [B, E], float32."""
        tower = self.clip.visual
        batch, count = frames.shape[:2]
        x = tower.embed(frames.reshape(batch * count, *frames.shape[2:]))  # [N, 1 + G, D]
        present = 0
        for layer, block in enumerate(tower.blocks):
            prompts = self.prompts.visual_at(layer) if self.method.prompts else None
            x = set_visual_prompts(x, prompts, present)  # [N, 1 + P + G, D]
            present = 0 if prompts is None else prompts.shape[0]
            if layer == 0:
                x = tower.ln_pre(x)  # the first prompts pass through it, as in the released code
            x = block(x)
        frame_features = unit(tower.project(x[:, 0])).reshape(batch, count, -1)  # [B, F, E]
        return unit(frame_features.mean(axis=1))

    def encode_text(self, ids: jax.Array) -> jax.Array:
        """int32 [N, T] -> unit rows [N, E], float32; T is `method.text_slots`."""
        tower = self.clip.text
        slots = self.method.text_slots(self.clip_config)
        if ids.shape[1] != slots:
            raise ValueError(f"captions have {ids.shape[1]} token slots, the method {slots}")
        layout = TextLayout.of(ids, self.method)
        eot = ids.argmax(axis=-1)  # EOT is the largest id
        x = tower.embed(ids)  # [N, T, D]
        prompted = False
        for layer, block in enumerate(tower.blocks):
            prompts = self.prompts.text_at(layer) if self.method.prompts else None
            if prompts is not None:
                x = layout.replace(x if prompted else layout.insert(x), prompts)
            elif prompted:
                x = layout.remove(x)
            prompted = prompts is not None
            if layer == 0:
                x = x + tower.positions(x.shape[1])  # only the first prompts receive positions
            x = block(x)  # [N, T + P, D]
        read = eot + (layout.tokens if prompted else 0)
        return unit(tower.project(x[jnp.arange(x.shape[0]), read]))

    def temperature(self) -> jax.Array:
        """The factor on similarities, see `Clip.temperature`."""
        return self.clip.temperature()

    def __call__(self, frames: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_video(frames), self.encode_text(ids)
