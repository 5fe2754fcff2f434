"""The prompts of VoP, and where they stand in a tower's sequence.

Both towers do the same: before a prompted layer its prompts take the place of the previous
layer's, so the outputs at prompt positions are dropped (the paper's equations 3 to 6).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.config import ClipConfig
from vop_jax.tuning.context import Context
from vop_jax.tuning.frame_tables import check_frames
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
        self.split = m.split(c.vision_layers)
        prompted = m.layers(c.vision_layers) if m.visual_tokens else range(0)
        self.frame_layers = [layer for layer in prompted if layer < self.split]
        self.video_layers = [layer for layer in prompted if layer >= self.split]
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
        if m.frame_position and self.split < c.vision_layers:
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
            The prompts, [B * F, P, D] before the split, [P, D] after it, None where the layer
            has none; and the CLS tokens, which only the context in its role `cls` changes.
        """
        if layer in self.video_layers:
            return self.video[self.video_layers.index(layer)], cls
        if layer not in self.frame_layers:
            return None, cls
        if self.method.makes_context("cls"):
            cls = cls + self.context(cls)[:, :, 0]
        prompts = self._frame_prompts(self.frame_layers.index(layer), cls)
        return prompts.reshape(-1, *prompts.shape[2:]), cls

    def _frame_prompts(self, index: int, cls: jax.Array) -> jax.Array:
        """[B, F, P, D]: the generic ones, then the frame's own."""
        parts = []
        if self.method.visual_tokens > self.method.specific_tokens:
            parts.append(self.visual[index][None, None])  # [1, 1, P, D]
        if self.method.specific_tokens and self.method.parts.specific == "position":
            check_frames(cls.shape[1], self.method.frames)
            parts.append(self.position[index][None])  # [1, F, P, D]
        elif self.method.specific_tokens:
            parts.append(self.context(cls))  # [B, F, P, D]
        clips = cls.shape[:2]
        return jnp.concatenate(
            [jnp.broadcast_to(p, clips + p.shape[2:]).astype(cls.dtype) for p in parts], axis=2
        )

    def join_frames(self, x: jax.Array) -> jax.Array:
        """Frames [B, F, 1 + G, D] -> one sequence a clip [B, F + F * G, D]: all CLS first."""
        if self.method.frame_position:
            check_frames(x.shape[1], self.method.frames)
            x = x + self.frame_position.astype(x.dtype)[None, :, None]
        patches = x[:, :, 1:].reshape(x.shape[0], -1, x.shape[-1])
        return jnp.concatenate([x[:, :, 0], patches], axis=1)


def set_visual_prompts(
    x: jax.Array, prompts: jax.Array | None, present: int, cls: int = 1
) -> jax.Array:
    """[CLS, old prompts, patches] -> [CLS, prompts, patches].

    Args:
        x: [N, C + present + G, D].
        prompts: [P, D], shared by all sequences, or [N, P, D]; None removes the old ones.
        present: how many old prompt tokens stand after CLS.
        cls: C, how many CLS tokens lead: one, or one of each frame.
    """
    if prompts is None:
        return jnp.concatenate([x[:, :cls], x[:, cls + present :]], axis=1) if present else x
    own = jnp.broadcast_to(prompts.astype(x.dtype), (x.shape[0], *prompts.shape[-2:]))
    if present and own.shape[1] == present:  # in their places: nothing else moves
        return jax.lax.dynamic_update_slice_in_dim(x, own, cls, axis=1)
    return jnp.concatenate([x[:, :cls], own, x[:, cls + present :]], axis=1)


@dataclasses.dataclass(frozen=True)
class TextLayout:
    """Where prompts stand in each caption: [SOS, prefix, words, suffix, rest].

    Attributes:
        prefix, suffix: numbers of prompt tokens.
        slots: T, the caption's token slots.
        suffix_slot: [N], the slot right before which the suffix stands.
    """

    prefix: int
    suffix: int
    slots: int
    suffix_slot: jax.Array

    @classmethod
    def of(cls, ids: jax.Array, method: MethodConfig) -> "TextLayout":
        """The layout of captions `ids` [N, T].

        `suffix="eot"`: before each caption's own EOT. `"released"`: before the last slot, as
        in the published code, where for a short caption that is behind EOT and, under the
        causal mask, never seen by it.
        """
        slots = ids.shape[1]
        eot = ids.argmax(axis=-1)
        at = eot if method.suffix == "eot" else jnp.full_like(eot, slots - 1)
        return cls(method.text_prefix, method.text_suffix, slots, at)

    @property
    def tokens(self) -> int:
        """P, prefix and suffix."""
        return self.prefix + self.suffix

    def _selection(self) -> jax.Array:
        """float32 [N, T + P, P]: which prompt stands at which position, one-hot or zero."""
        t = jnp.arange(self.slots + self.tokens)[None, :, None]
        p = jnp.arange(self.tokens)[None, None, :]
        # Prompt p stands at 1 + p in the prefix, at suffix_slot + p in the suffix.
        at = jnp.where(p < self.prefix, 1 + p, self.suffix_slot[:, None, None] + p)
        return (t == at).astype(jnp.float32)

    def insert(self, x: jax.Array) -> jax.Array:
        """[N, T, D] -> [N, T + P, D] with room, zeros, at the prompt positions."""
        # Shifts and selects instead of a gather: a gather's gradient is a scatter, which is
        # slow on TPUs and not deterministic on GPUs.
        t = jnp.arange(self.slots + self.tokens)[None, :]
        first_rest = (self.suffix_slot + self.tokens)[:, None]
        near = jnp.pad(x, ((0, 0), (self.prefix, self.suffix), (0, 0)))
        far = jnp.pad(x, ((0, 0), (self.tokens, 0), (0, 0)))
        start = jnp.pad(x[:, :1], ((0, 0), (0, t.size - 1), (0, 0)))
        words = jnp.where((t >= first_rest)[..., None], far, near)
        words = jnp.where((t == 0)[..., None], start, words)
        return jnp.where(self._selection().any(axis=-1, keepdims=True), 0, words)

    def remove(self, x: jax.Array) -> jax.Array:
        """[N, T + P, D] -> [N, T, D], the inverse of `insert`."""
        s = jnp.arange(self.slots)[None, :, None]
        near = x[:, self.prefix : self.prefix + self.slots]
        far = x[:, self.tokens :]
        words = jnp.where(s >= self.suffix_slot[:, None, None], far, near)
        return jnp.where(s == 0, x[:, : self.slots], words)

    def replace(self, x: jax.Array, prompts: jax.Array) -> jax.Array:
        """[N, T + P, D] with `prompts` [P, D] at the prompt positions, words untouched."""
        selection = self._selection()
        placed = jnp.einsum(
            "ntp,pd->ntd",
            selection,
            prompts.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,  # a selection must not round what it selects
        )
        return jnp.where(selection.any(axis=-1, keepdims=True), placed.astype(x.dtype), x)
