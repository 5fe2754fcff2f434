"""The prompts of VoP: the tokens of every layer, and where they stand in a sequence."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.config.clip import ClipConfig
from vop_jax.tuning.context import Context
from vop_jax.tuning.methods import MethodConfig

# Modules that generate each frame's own prompts, by `Method.specific`. They are called with the
# CLS tokens that enter a layer, [B, F, D] -> [B, F, P, D], and shared by all layers.
GENERATORS: dict[str, type[nn.Module]] = {"context": Context}


class Prompts(nn.Module):
    """The prompts of both towers, and the step that joins the frames of a clip.

    Parameters, each where the method has it (L counts the prompted layers):
        text: [L, P, D], shared by all captions: the prefix A_i, then the suffix Z_i of eq. (3).
        visual: [L before the split layer, P, D], generic: shared by all frames, eq. (1).
        position: [L before the split layer, F, P, D]: a table shared by all videos.
        context: the module that generates a frame's prompts from its clip's CLS tokens, eq. (6).
        video: [L after the split layer, P, D], generic: one set for all frames of a clip, eq. (7).
        frame_position: [F, D], added to all tokens of a frame where frames are joined, eq. (7).
    """

    method: MethodConfig
    clip_config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        m, c = self.method, self.clip_config
        init, width = nn.initializers.normal(m.init_std), c.vision_width
        split_layer = m.resolved_split_layer(c.vision_layers)
        prompted = m.layers(c.vision_layers) if m.visual_tokens else range(0)
        self.frame_layers = [layer for layer in prompted if layer < split_layer]
        self.video_layers = [layer for layer in prompted if layer >= split_layer]
        self.text_layers = m.layers(c.text_layers) if m.text_tokens else range(0)
        count, specific, source = len(self.frame_layers), m.specific_tokens, m.parts.specific

        if self.text_layers:
            shape = (len(self.text_layers), m.text_tokens, c.text_width)
            self.text = self.param("text", init, shape)
        if count and m.visual_tokens > specific:
            self.visual = self.param("visual", init, (count, m.visual_tokens - specific, width))
        if count and specific and source == "position":
            self.position = self.param("position", init, (count, m.frames, specific, width))
        if count and (specific or m.updates_cls) and source != "position":
            generator = GENERATORS[source]
            self.generator = generator(
                m, width, specific or 1, c.activation, self.dtype, name=source
            )
        if self.video_layers:
            shape = (len(self.video_layers), m.visual_tokens, width)
            self.video = self.param("video", init, shape)
        if m.frame_position and split_layer < c.vision_layers:
            self.frame_position = self.param("frame_position", init, (m.frames, width))

    def text_at(self, layer: int) -> jax.Array | None:
        """[P, D], the prompts of a text layer (from 0); None where it has none."""
        if layer not in self.text_layers:
            return None
        return self.text[self.text_layers.index(layer)]

    def visual_at(self, layer: int, cls: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """The prompts of a vision layer, and the CLS tokens as they enter it.

        Args:
            layer: from 0.
            cls: [B, F, D], the CLS tokens before the layer.

        Returns:
            prompts: [M, P, D], where sequence n, a frame or after the split layer a clip, has
                those of n modulo M; None where the layer has none.
            cls: the argument, unless a context in its role `cls` updated it.
        """
        if layer in self.video_layers:
            return self.video[self.video_layers.index(layer)][None].astype(cls.dtype), cls
        if layer not in self.frame_layers:
            return None, cls
        if self.method.updates_cls:
            cls = cls + self.generator(cls)[:, :, 0]
        return self._frame_prompts(self.frame_layers.index(layer), cls), cls

    def _frame_prompts(self, index: int, cls: jax.Array) -> jax.Array:
        """[M, P, D]: the generic prompts, then each frame's own."""
        parts = []
        if self.method.visual_tokens > self.method.specific_tokens:
            parts.append(self.visual[index][None])  # [1, P, D]
        if self.method.specific_tokens and self.method.parts.specific == "position":
            self.method.check_frames(cls.shape[1])
            parts.append(self.position[index])  # [F, P, D]
        elif self.method.specific_tokens:
            own = self.generator(cls)
            parts.append(own.reshape(-1, *own.shape[2:]))  # [B * F, P, D]
        count = parts[-1].shape[0]  # symbolic when the model is exported
        same = [jnp.broadcast_to(p, (count, *p.shape[1:])).astype(cls.dtype) for p in parts]
        return jnp.concatenate(same, axis=1)

    def join_frames(self, x: jax.Array) -> jax.Array:
        """Frames [B, F, 1 + G, D] -> one sequence per clip [B, F + F * G, D]: all CLS first."""
        if self.method.frame_position:
            self.method.check_frames(x.shape[1])
            x = x + self.frame_position.astype(x.dtype)[None, :, None]
        patches = x[:, :, 1:].reshape(x.shape[0], -1, x.shape[-1])
        return jnp.concatenate([x[:, :, 0], patches], axis=1)


@dataclasses.dataclass(frozen=True)
class TextLayout:
    """The positions of words and prompts: [SOS, prefix, words, suffix, rest] for each caption.

    Attributes:
        words: int32 [N, T], the positions of a caption's tokens among prompts.
        prompts: int32 [N, P], the positions of prefix and suffix.
    """

    words: jax.Array
    prompts: jax.Array

    @classmethod
    def of(cls, ids: jax.Array, method: MethodConfig) -> "TextLayout":
        """The layout of captions `ids` [N, T].

        With `suffix="eot"` the suffix stands before each caption's own EOT. With "released" it
        stands before the last slot, as in the released code; in a short caption that is behind
        EOT, where the causal mask hides it.
        """
        prefix, suffix = method.text_prefix, method.text_suffix
        slot, prompt = jnp.arange(ids.shape[1])[None], jnp.arange(prefix + suffix)[None]
        eot = ids.argmax(axis=-1, keepdims=True)
        # The slot right after the suffix.
        end = eot if method.suffix == "eot" else jnp.full_like(eot, ids.shape[1] - 1)
        words = slot + prefix * (slot > 0) + suffix * (slot >= end)
        return cls(words, jnp.where(prompt < prefix, 1 + prompt, end + prompt))

    @property
    def mask(self) -> jax.Array:
        """bool [N, T, P]: a token attends to the prompts before it."""
        return self.prompts[:, None, :] < self.words[:, :, None]

    def insert(self, x: jax.Array, prompts: jax.Array) -> jax.Array:
        """Tokens [N, T, D] and prompts [1 or N, P, D] as one sequence [N, T + P, D]."""
        prompts = jnp.broadcast_to(prompts, (x.shape[0], *prompts.shape[1:]))
        order = jnp.concatenate([self.words, self.prompts], axis=1).argsort(axis=1)
        return jnp.take_along_axis(jnp.concatenate([x, prompts], axis=1), order[..., None], axis=1)
