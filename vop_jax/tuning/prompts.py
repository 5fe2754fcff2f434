"""The prompts of VoP, and where they stand beside a tower's sequence.

Both towers do the same: a prompted layer's prompts take the place of the previous layer's, so
what comes out at prompt positions is dropped (the paper's equations 3 to 6). Hence it is never
made: prompts are looked at, as keys and values, and are no part of the sequence.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.config.clip import ClipConfig
from vop_jax.tuning.context import Context
from vop_jax.tuning.methods import MethodConfig


class Prompts(nn.Module):
    """The prompts of every prompted layer of both towers, and where frames meet.

    Parameters, each where the method has it (`layers` of a tower are the prompted ones):
        text: [layers, P, D], shared by all captions.
        visual: [layers before the split, P, D], generic: shared by all frames.
        position: [layers before the split, F, P, D], a table: shared by all videos.
        context: the module that makes a frame's prompts from its clip's CLS tokens.
        video: [layers after the split, P, D], generic: one set for all frames of a clip.
        frame_position: [F, D], added to all tokens of a frame where frames meet.
    """

    method: MethodConfig
    clip_config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        m, c = self.method, self.clip_config
        init = nn.initializers.normal(m.init_std)
        self.split_layer = m.resolved_split_layer(c.vision_layers)
        prompted = m.layers(c.vision_layers) if m.visual_tokens else range(0)
        self.frame_layers = [layer for layer in prompted if layer < self.split_layer]
        self.video_layers = [layer for layer in prompted if layer >= self.split_layer]
        self.text_layers = m.layers(c.text_layers)
        count, specific, width = len(self.frame_layers), m.specific_tokens, c.vision_width

        if m.text_tokens:
            shape = (len(self.text_layers), m.text_tokens, c.text_width)
            self.text = self.param("text", init, shape)
        if count and m.visual_tokens > specific:
            self.visual = self.param("visual", init, (count, m.visual_tokens - specific, width))
        if count and specific and m.parts.specific == "position":
            self.position = self.param("position", init, (count, m.frames, specific, width))
        if count and (specific or m.makes_context("cls")) and m.parts.specific == "context":
            self.context = Context(m, width, specific or 1, c.activation, self.dtype)
        if self.video_layers:
            shape = (len(self.video_layers), m.visual_tokens, width)
            self.video = self.param("video", init, shape)
        if m.frame_position and self.split_layer < c.vision_layers:
            self.frame_position = self.param("frame_position", init, (m.frames, width))

    def text_at(self, layer: int) -> jax.Array | None:
        """[P, D] for a text layer (from 0), None where it has no prompts."""
        if not self.method.text_tokens or layer not in self.text_layers:
            return None
        return self.text[self.text_layers.index(layer)]

    def visual_at(self, layer: int, cls: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """A vision layer's prompts, and the CLS tokens as they go into it.

        Args:
            layer: from 0.
            cls: [B, F, D], the CLS tokens that enter the layer.

        Returns:
            The prompts [M, P, D], where frame n of all B * F (after the split, clip n) has those
            of n modulo M; None where the layer has none. And the CLS tokens, the same object
            unless a context in its role `cls` changed them.
        """
        if layer in self.video_layers:
            return self.video[self.video_layers.index(layer)][None].astype(cls.dtype), cls
        if layer not in self.frame_layers:
            return None, cls
        if self.method.makes_context("cls"):
            cls = cls + self.context(cls)[:, :, 0]
        return self._frame_prompts(self.frame_layers.index(layer), cls), cls

    def _frame_prompts(self, index: int, cls: jax.Array) -> jax.Array:
        """[M, P, D]: the generic ones, then a frame's own."""
        parts = []
        if self.method.visual_tokens > self.method.specific_tokens:
            parts.append(self.visual[index][None])  # [1, P, D]
        if self.method.specific_tokens and self.method.parts.specific == "position":
            self.method.check_frames(cls.shape[1])
            parts.append(self.position[index])  # [F, P, D]
        elif self.method.specific_tokens:
            own = self.context(cls)
            parts.append(own.reshape(-1, *own.shape[2:]))  # [B * F, P, D]
        most = parts[-1].shape[0]
        wide = [jnp.broadcast_to(p, (most, *p.shape[1:])).astype(cls.dtype) for p in parts]
        return jnp.concatenate(wide, axis=1)

    def join_frames(self, x: jax.Array) -> jax.Array:
        """Frames [B, F, 1 + G, D] -> one sequence a clip [B, F + F * G, D]: all CLS first."""
        if self.method.frame_position:
            self.method.check_frames(x.shape[1])
            x = x + self.frame_position.astype(x.dtype)[None, :, None]
        patches = x[:, :, 1:].reshape(x.shape[0], -1, x.shape[-1])
        return jnp.concatenate([x[:, :, 0], patches], axis=1)


@dataclasses.dataclass(frozen=True)
class TextLayout:
    """Where words and prompts of each caption stand: [SOS, prefix, words, suffix, rest].

    Attributes:
        words: int32 [N, T], the places of a caption's tokens among prompts.
        prompts: int32 [N, P], the places of prefix and suffix.
    """

    words: jax.Array
    prompts: jax.Array

    @classmethod
    def of(cls, ids: jax.Array, method: MethodConfig) -> "TextLayout":
        """The layout of captions `ids` [N, T].

        `suffix="eot"`: before each caption's own EOT. `"released"`: before the last slot, as
        in the published code, where for a short caption that is behind EOT and, under the
        causal mask, never seen by it.
        """
        prefix, suffix = method.text_prefix, method.text_suffix
        slot, prompt = jnp.arange(ids.shape[1])[None], jnp.arange(prefix + suffix)[None]
        eot = ids.argmax(axis=-1, keepdims=True)
        # The slot right before which the suffix stands.
        behind = eot if method.suffix == "eot" else jnp.full_like(eot, ids.shape[1] - 1)
        words = slot + prefix * (slot > 0) + suffix * (slot >= behind)
        return cls(words, jnp.where(prompt < prefix, 1 + prompt, behind + prompt))

    @property
    def seen(self) -> jax.Array:
        """bool [N, T, P]: a token looks at the prompts before it."""
        return self.prompts[:, None, :] < self.words[:, :, None]

    def placed(self, x: jax.Array, prompts: jax.Array) -> jax.Array:
        """Tokens [N, T, D] and prompts [M, P, D] as one sequence [N, T + P, D]."""
        own = jnp.broadcast_to(prompts, (x.shape[0], *prompts.shape[1:]))
        order = jnp.concatenate([self.words, self.prompts], axis=1).argsort(axis=1)
        return jnp.take_along_axis(jnp.concatenate([x, own], axis=1), order[..., None], axis=1)
