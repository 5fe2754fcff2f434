"""Text and video into one space: CLIP's parts with the tuning parts. This is the paper."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.layers import ACROSS_FRAMES, Kernel, PromptTokens
from vop_jax.clip.model import Clip, unit
from vop_jax.clip.remat import Remat
from vop_jax.clip.weights import parameter_shapes
from vop_jax.config.clip import ClipConfig
from vop_jax.storage.tensors import flatten
from vop_jax.tuning.adapters import Adapters
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompts import Prompts, TextLayout


class TextVideoModel(nn.Module):
    """CLIP under `clip`, what a method adds to it under `prompts` or `adapters`.

    Attributes:
        dtype: of matmuls.
        kernel: of attention; some across frames alone, where sequences are F times as long.
            Only "xla" ever holds their [F * G, F * G] weights.
        remat: what the backward pass computes again.
    """

    clip_config: ClipConfig
    method: MethodConfig
    dtype: jnp.dtype = jnp.float32
    kernel: Kernel = "xla"
    remat: Remat = Remat()

    def setup(self):
        self.clip = Clip(self.clip_config, self.dtype)
        if self.method.parts.prompts:
            self.prompts = Prompts(self.method, self.clip_config, self.dtype)
        if self.method.parts.adapter:
            self.adapters = Adapters(self.method, self.clip_config, self.dtype)

    def example(self) -> tuple[jax.Array, jax.Array]:
        """The smallest (frames, ids) the model takes, zeros, to initialise it with."""
        size = self.clip_config.image_size
        frames = jnp.zeros((1, self.method.frames, size, size, 3), jnp.uint8)
        return frames, jnp.zeros((1, self.method.text_slots(self.clip_config)), jnp.int32)

    def init_added(self, key: jax.Array) -> dict[str, Any]:
        """What the method adds to CLIP: {"prompts": ...}, {"adapters": ...} or {}.

        The values are those of `init` with the same key, without the time to trace CLIP.
        """
        return self.init(key, method="_touch_added").get("params", {})

    def _touch_added(self) -> None:
        if self.method.parts.prompts:  # a context is made by the first layer that asks for it
            frames, width = self.method.frames, self.clip_config.vision_width
            cls = jnp.zeros((1, frames, width), self.dtype)
            self.prompts.visual_at(self.method.first_layer - 1, cls)
        if self.method.parts.adapter:
            for adapter in (*self.adapters.visual, *self.adapters.text):
                adapter(jnp.zeros((1, adapter.width), self.dtype))

    @nn.nowrap  # else a Clip that is made within becomes its child
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """All parameters' shapes, sorted by name; nothing is computed."""
        clip = parameter_shapes(self.clip_config)
        shapes = {f"clip/{name}": jax.ShapeDtypeStruct(s, jnp.float32) for name, s in clip.items()}
        shapes |= flatten(jax.eval_shape(self.init_added, jax.random.key(0)))
        return {name: shapes[name] for name in sorted(shapes)}

    def encode_video(self, frames: jax.Array) -> jax.Array:
        """uint8 [B, F, S, S, 3] -> unit rows [B, E], float32."""
        return unit(self.encode_frames(frames).mean(axis=1))

    def encode_frames(self, frames: jax.Array) -> jax.Array:
        """uint8 [B, F, S, S, 3] -> each frame within its clip, unit rows [B, F, E], float32."""
        tower = self.clip.visual
        batch, count = frames.shape[:2]
        split_layer = self.method.resolved_split_layer(self.clip_config.vision_layers)
        x = tower.embed(frames.reshape(batch * count, *frames.shape[2:]))  # [B * F, 1 + G, D]
        cls_count = 1  # CLS tokens at the start of each sequence
        for layer, block in enumerate(tower.blocks):
            if layer == split_layer:  # from here on all frames of a clip are one sequence
                x = self.prompts.join_frames(x.reshape(batch, count, *x.shape[1:]))
                cls_count = count  # [B, F + F * G, D]
            prompts = None
            if self.method.parts.prompts:
                cls = x[:, :cls_count].reshape(batch, count, -1)  # [B, F, D]
                prompts, updated = self.prompts.visual_at(layer, cls)
                if updated is not cls:
                    updated = updated.reshape(-1, cls_count, cls.shape[-1])
                    x = jnp.concatenate([updated, x[:, cls_count:]], axis=1)
            if layer == 0:  # the first prompts pass through it, too, as in the released code
                x = tower.ln_pre(x)
                prompts = None if prompts is None else tower.ln_pre(prompts)
            across = layer >= split_layer
            kernel: Kernel = self.kernel if across or self.kernel not in ACROSS_FRAMES else "xla"
            x = self.remat.apply(
                block,
                x,
                self._branches("visual", layer),
                None if prompts is None else PromptTokens(prompts),
                kernel,
                frames=not across,
                query_positions=cls_count if block is tower.blocks[-1] else None,
            )
        return unit(tower.project(x.reshape(batch, count, -1)))

    def _branches(self, tower: str, layer: int) -> dict[str, Any]:
        return self.adapters.at(tower, layer) if self.method.parts.adapter else {}

    def encode_text(self, ids: jax.Array) -> jax.Array:
        """int32 [N, T] -> unit rows [N, E], float32; T is at most `method.text_slots`.

        Fewer slots give the same rows if they hold each caption's EOT.
        """
        tower = self.clip.text
        slots = self.method.text_slots(self.clip_config)
        if ids.shape[1] > slots:
            raise ValueError(f"captions have {ids.shape[1]} token slots, the method {slots}")
        if ids.shape[1] < slots and not self.method.takes_fewer_slots:
            raise ValueError(f"suffix='released' stands before slot {slots}, not {ids.shape[1]}")
        layout = TextLayout.of(ids, self.method)
        eot = ids.argmax(axis=-1)  # EOT is the largest id
        x = tower.embed(ids)  # [N, T, D]
        for layer, block in enumerate(tower.blocks):
            prompts = self._text_prompts(layer, layout)
            if layer == 0:  # only the first prompts receive positions, and move those of words
                alone = jnp.arange(ids.shape[1])[None]
                x = x + tower.positions(alone if prompts is None else layout.words)
            query_positions = eot if block is tower.blocks[-1] else None
            released = self.method.suffix == "released"
            if query_positions is not None and prompts is not None and released:
                # The published code looks for EOT behind all prompts, also where a short caption
                # has them behind EOT: what it reads may be a prompt.
                x = layout.placed(x, prompts.tokens)
                query_positions = eot + prompts.tokens.shape[1]
                prompts = None
            kernel: Kernel = "fused" if self.kernel == "fused" else "xla"  # no other has masks
            branches = self._branches("text", layer)
            x = self.remat.apply(
                block, x, branches, prompts, kernel, query_positions=query_positions
            )
        return unit(tower.project(x[:, 0]))

    def _text_prompts(self, layer: int, layout: TextLayout) -> PromptTokens | None:
        prompts = self.prompts.text_at(layer) if self.method.parts.prompts else None
        if prompts is None:
            return None
        tokens = prompts.astype(self.dtype)[None]  # [1, P, D]
        if layer == 0:
            tokens = tokens + self.clip.text.positions(layout.prompts)  # [N, P, D]
        return PromptTokens(tokens, layout.seen)

    def temperature(self) -> jax.Array:
        """The factor on similarities, see `Clip.temperature`."""
        return self.clip.temperature()

    def __call__(self, frames: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_video(frames), self.encode_text(ids)
