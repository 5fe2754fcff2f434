"""Context: what the frames of a clip tell one frame.

The context modelling module (CMM) runs over the F CLS tokens that enter a layer; a dense layer
then makes from each modulated token the frame's own prompts. Both are shared by all layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.layers import Block
from vop_jax.tuning.frame_tables import check_frames
from vop_jax.tuning.methods import MethodConfig

TRANSFORMER_LAYERS = 4
HEAD_WIDTH = 64


class Context(nn.Module):
    """CLS tokens of a clip's frames [B, F, D] -> `tokens` tokens for each [B, F, tokens, D]."""

    method: MethodConfig
    width: int
    tokens: int
    activation: str
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.method.cmm == "transformer":
            self.transformer = FrameTransformer(
                self.width, self.method.frames, self.method.init_std, self.activation, self.dtype
            )
        else:
            directions = {"lstm": 1, "bilstm": 2}[self.method.cmm]
            self.lstm = Lstm(self.width, directions, self.dtype)
        # Small at first, so that what it makes is about the size of the generic prompts.
        init = nn.initializers.normal(self.method.init_std)
        self.stretch = nn.Dense(self.tokens * self.width, kernel_init=init, dtype=self.dtype)

    def __call__(self, cls: jax.Array) -> jax.Array:
        modulate = self.transformer if self.method.cmm == "transformer" else self.lstm
        out = self.stretch(modulate(cls))  # [B, F, P * D]
        return out.reshape(*cls.shape[:2], self.tokens, self.width)


class Lstm(nn.Module):
    """LSTM over frames [B, F, D] -> [B, F, directions * D], the equations of torch.nn.LSTM.

    Own code for speed: flax's cell projects its input anew at each frame and runs the two
    directions one after the other; here all frames are projected in one product and both
    directions advance in one scan. Gates are in PyTorch's order: input, forget, cell, output.
    """

    width: int
    directions: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, d = self.directions, self.width
        bound = d**-0.5  # PyTorch's own initialisation

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        input_kernel = self.param("input_kernel", init, (k, d, 4 * d)).astype(self.dtype)
        hidden_kernel = self.param("hidden_kernel", init, (k, d, 4 * d)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (k, 4 * d))

        x = x.astype(self.dtype)
        directed = jnp.stack([x, x[:, ::-1]][:k])  # [K, B, F, D]
        from_input = jnp.einsum("kbfd,kdg->fkbg", directed, input_kernel).astype(jnp.float32)
        from_input = from_input + bias[None, :, None]  # [F, K, B, 4 D]

        def step(state, gates):
            hidden, cell = state  # [K, B, D], float32
            gates = gates + jnp.einsum("kbd,kdg->kbg", hidden.astype(self.dtype), hidden_kernel)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
            hidden = nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        start = jnp.zeros((k, x.shape[0], d), jnp.float32)
        _, states = jax.lax.scan(step, (start, start), from_input)  # [F, K, B, D]
        both = [states[:, 0], states[::-1, 1]] if k == 2 else [states[:, 0]]
        return jnp.concatenate(both, axis=-1).swapaxes(0, 1).astype(self.dtype)


class FrameTransformer(nn.Module):
    """Transformer over frames [B, F, D] -> [B, F, D], with a position embedding of frames."""

    width: int
    frames: int
    init_std: float
    activation: str
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.frame_position = self.param("frame_position", init, (self.frames, self.width))
        heads = max(1, self.width // HEAD_WIDTH)
        self.blocks = [
            Block(self.width, heads, self.activation, dtype=self.dtype)
            for _ in range(TRANSFORMER_LAYERS)
        ]

    def __call__(self, x: jax.Array) -> jax.Array:
        check_frames(x.shape[1], self.frames)
        x = x + self.frame_position.astype(x.dtype)[None]
        for block in self.blocks:
            x = block(x)
        return x
