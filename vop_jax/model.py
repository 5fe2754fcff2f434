"""The paper: captions and videos become embeddings in one space, by CLIP and a method's parts.

Both encoders read embed -> prompts -> blocks -> project. Equations have the numbers of
docs/paper.md. c is the CLS token of a frame and E its patches; s, w, e are SOS, words and EOT of a
caption; Layer_i is a frozen block of CLIP, and P_i, A_i, Z_i are its prompts.

    (1)  [c, _, E] = Layer_i([c, P_i, E])                                  encode_frames
    (2)  v = unit(mean over frames of unit(W_v LN(c)))                     encode_video
    (3)  [s, _, w, _, e] = Layer_i([s, A_i, w, Z_i, e])                    encode_text
    (4)  t = unit(W_t LN(e))                                               encode_text
    (5)  the loss of v and t                                               training/step.py
    (6)  prompts of frame j generated from c_1 … c_F                       tuning/context.py
    (7)  [c_1 … c_F, _, E_1 … E_F] = Layer_i([c_1 … c_F, P_i, E_1 … E_F])  encode_frames

The outputs "_" at prompt positions are dropped: the next layer has prompts of its own. So prompts
are extra keys and values of the attention and never part of the sequence.
"""

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
    """CLIP's parameters under `clip`; what a method adds to them under `prompts` or `adapters`.

    Attributes:
        dtype: of matrix products.
        kernel: of attention. "blocks" and "splash" are used only across frames, where sequences
            are F times as long.
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

    def __call__(self, frames: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 [B, F, S, S, 3] and int32 [N, T] -> unit rows [B, E] and [N, E], float32."""
        return self.encode_video(frames), self.encode_text(ids)

    def encode_video(self, frames: jax.Array) -> jax.Array:
        """uint8 [B, F, S, S, 3] -> unit rows [B, E], float32. Equation (2)."""
        return unit(self.encode_frames(frames).mean(axis=1))

    def encode_frames(self, frames: jax.Array) -> jax.Array:
        """uint8 [B, F, S, S, 3] -> unit rows [B, F, E], float32: each frame as part of its clip.

        Equation (1) up to the split layer, (7) after it.
        """
        tower, (batch, count) = self.clip.visual, frames.shape[:2]
        split_layer = self.method.resolved_split_layer(self.clip_config.vision_layers)
        x = tower.embed(frames.reshape(-1, *frames.shape[2:]))  # [B * F, 1 + G, D]
        for layer, block in enumerate(tower.blocks):
            across_frames = layer >= split_layer
            if layer == split_layer:  # eq. (7): all frames of a clip are one sequence
                x = self.prompts.join_frames(x.reshape(batch, count, *x.shape[1:]))
            cls_count = count if across_frames else 1  # CLS tokens at the start of a sequence
            prompts = None
            if self.method.parts.prompts:
                cls = x[:, :cls_count].reshape(batch, count, -1)  # [B, F, D]
                prompts, cls = self.prompts.visual_at(layer, cls)
                if self.method.updates_cls:
                    cls = cls.reshape(-1, cls_count, cls.shape[-1])
                    x = jnp.concatenate([cls, x[:, cls_count:]], axis=1)
            if layer == 0:  # the first prompts pass ln_pre too, as in the released code
                x = tower.ln_pre(x)
                prompts = None if prompts is None else tower.ln_pre(prompts)
            any_length = across_frames or self.kernel not in ACROSS_FRAMES
            x = self.remat.apply(
                block,
                x,
                self._adapters_at("visual", layer),
                None if prompts is None else PromptTokens(prompts),
                self.kernel if any_length else "xla",
                frames=not across_frames,
                query_positions=cls_count if block is tower.blocks[-1] else None,
            )
        return unit(tower.project(x.reshape(batch, count, -1)))

    def encode_text(self, ids: jax.Array) -> jax.Array:
        """int32 [N, T] -> unit rows [N, E], float32; T is at most `method.text_slots`.

        Equations (3) and (4). Fewer slots give the same rows if they contain each caption's EOT.
        """
        self._check_slots(ids.shape[1])
        tower, layout = self.clip.text, TextLayout.of(ids, self.method)
        eot = ids.argmax(axis=-1)  # EOT is the largest id
        x = tower.embed(ids)  # [N, T, D]
        for layer, block in enumerate(tower.blocks):
            prompts = self._text_prompts_at(layer, layout)
            if layer == 0:  # only the first prompts have positions; they shift the words'
                words = jnp.arange(ids.shape[1])[None] if prompts is None else layout.words
                x = x + tower.positions(words)
            query_positions = eot if block is tower.blocks[-1] else None
            released = self.method.suffix == "released"
            if query_positions is not None and prompts is not None and released:
                # The released code reads at EOT + P, also where a short caption has prompts behind
                # EOT. What it reads there may be a prompt, so here prompts join the sequence.
                x = layout.insert(x, prompts.tokens)
                query_positions, prompts = eot + prompts.tokens.shape[1], None
            x = self.remat.apply(
                block,
                x,
                self._adapters_at("text", layer),
                prompts,
                "fused" if self.kernel == "fused" else "xla",  # no other kernel has masks
                query_positions=query_positions,
            )
        return unit(tower.project(x[:, 0]))

    def temperature(self) -> jax.Array:
        """The factor on similarities, see `Clip.temperature`."""
        return self.clip.temperature()

    def _text_prompts_at(self, layer: int, layout: TextLayout) -> PromptTokens | None:
        prompts = self.prompts.text_at(layer) if self.method.parts.prompts else None
        if prompts is None:
            return None
        tokens = prompts.astype(self.dtype)[None]  # [1, P, D]
        if layer == 0:
            tokens = tokens + self.clip.text.positions(layout.prompts)  # [N, P, D]
        return PromptTokens(tokens, layout.mask)

    def _adapters_at(self, tower: str, layer: int) -> dict[str, Any]:
        return self.adapters.at(tower, layer) if self.method.parts.adapter else {}

    def _check_slots(self, slots: int) -> None:
        allowed = self.method.text_slots(self.clip_config)
        if slots > allowed:
            raise ValueError(f"captions have {slots} token slots, the method {allowed}")
        if slots < allowed and not self.method.takes_fewer_slots:
            raise ValueError(f"suffix='released' stands before slot {allowed}, not {slots}")

    def example(self) -> tuple[jax.Array, jax.Array]:
        """The smallest (frames, ids) that the model takes, zeros, to initialise it with."""
        size = self.clip_config.image_size
        frames = jnp.zeros((1, self.method.frames, size, size, 3), jnp.uint8)
        return frames, jnp.zeros((1, self.method.text_slots(self.clip_config)), jnp.int32)

    def init_added(self, key: jax.Array) -> dict[str, Any]:
        """Initial values of what the method adds: {"prompts": …}, {"adapters": …} or {}.

        They are those of `init` with the same key, but CLIP is not traced.
        """
        if not (self.method.parts.prompts or self.method.parts.adapter):
            return {}
        return self.init(key, method="_touch_added")["params"]

    def _touch_added(self) -> None:
        # flax creates the parameters of a module when something uses it first.
        if self.method.parts.prompts:
            cls = jnp.zeros((1, self.method.frames, self.clip_config.vision_width), self.dtype)
            self.prompts.visual_at(self.method.first_layer - 1, cls)
        if self.method.parts.adapter:
            for adapter in (*self.adapters.visual, *self.adapters.text):
                adapter(jnp.zeros((1, adapter.width), self.dtype))

    @nn.nowrap  # so that a Clip created inside does not become its child
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """All parameters' shapes, sorted by name; nothing is computed."""
        clip = parameter_shapes(self.clip_config)
        shapes = {f"clip/{name}": jax.ShapeDtypeStruct(s, jnp.float32) for name, s in clip.items()}
        added = jax.eval_shape(lambda: self.init_added(jax.random.key(0)))
        shapes |= flatten(added)
        return dict(sorted(shapes.items()))
