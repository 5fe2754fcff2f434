"""The prompts of VoP, and where they stand in a tower's sequence.

Both towers do the same: before a prompted layer its prompts take the place of the previous
layer's, so the outputs at prompt positions are dropped (the paper's equations 3 to 6).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.config import ClipConfig
from vop_jax.tuning.methods import MethodConfig


class Prompts(nn.Module):
    """The generic prompts of every prompted layer: `visual` [L, P, D] and `text` [L, P, D]."""

    method: MethodConfig
    clip_config: ClipConfig

    def setup(self):
        m, c = self.method, self.clip_config
        init = nn.initializers.normal(m.init_std)
        if m.visual_tokens:
            shape = (len(m.layers(c.vision_layers)), m.visual_tokens, c.vision_width)
            self.visual = self.param("visual", init, shape)
        if m.text_tokens:
            shape = (len(m.layers(c.text_layers)), m.text_tokens, c.text_width)
            self.text = self.param("text", init, shape)

    def visual_at(self, layer: int) -> jax.Array | None:
        """[P, D] for a vision layer (from 0), None where it has no prompts."""
        layers = self.method.layers(self.clip_config.vision_layers)
        if not self.method.visual_tokens or layer not in layers:
            return None
        return self.visual[layers.index(layer)]

    def text_at(self, layer: int) -> jax.Array | None:
        """[P, D] for a text layer (from 0), None where it has no prompts."""
        layers = self.method.layers(self.clip_config.text_layers)
        if not self.method.text_tokens or layer not in layers:
            return None
        return self.text[layers.index(layer)]


def set_visual_prompts(x: jax.Array, prompts: jax.Array | None, present: int) -> jax.Array:
    """[CLS, old prompts, patches] -> [CLS, prompts, patches].

    Args:
        x: [N, 1 + present + G, D].
        prompts: [P, D], shared by all frames; None removes the old ones.
        present: how many old prompt tokens stand after CLS.
    """
    cls, patches = x[:, :1], x[:, 1 + present :]
    if prompts is None:
        return jnp.concatenate([cls, patches], axis=1) if present else x
    shared = jnp.broadcast_to(prompts.astype(x.dtype), (x.shape[0], *prompts.shape))
    return jnp.concatenate([cls, shared, patches], axis=1)


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
