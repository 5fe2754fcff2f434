"""Context: what the frames of a clip tell one frame.

The context modelling module (CMM) runs over the F CLS tokens that enter a layer; a dense layer
then makes from each modulated token the frame's own prompts. Both are shared by all layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.layers import Block
from vop_jax.tuning.methods import MethodConfig

TRANSFORMER_LAYERS = 4
HEAD_WIDTH = 64
# Frames of the recurrence in one turn of its loop. An accelerator is busy with each so briefly that
# starting its operations counts, and there are fewer of them; more take long to compile.
UNROLL = 4


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
        if self.method.cmm == "transformer":
            self.method.check_frames(cls.shape[1])
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

        states = recurrence(from_input, hidden_kernel)  # [F, K, B, D]
        both = [states[:, 0], states[::-1, 1]] if k == 2 else [states[:, 0]]
        return jnp.concatenate(both, axis=-1).swapaxes(0, 1).astype(self.dtype)


@jax.custom_vjp
def recurrence(from_input: jax.Array, hidden_kernel: jax.Array) -> jax.Array:
    """What an LSTM that starts at zero puts out.

    The derivative is written out so that the kernel's gradient is one product over all frames;
    left to `scan` it is a sum of products, read and written anew at each frame.

    Args:
        from_input: float32 [F, K, B, 4 D], the gates' part that is not recurrent.
        hidden_kernel: [K, D, 4 D], in the dtype of products.

    Returns:
        float32 [F, K, B, D].
    """
    return _advance(from_input, hidden_kernel)[0]


def _advance(from_input: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """(hidden, cell, gates after their activations) of each frame."""

    def step(state, gates):
        hidden, cell = state  # [K, B, D], float32
        gates = gates + jnp.einsum("kbd,kdg->kbg", hidden.astype(kernel.dtype), kernel)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
        cell = f * cell + i * g
        hidden = o * jnp.tanh(cell)
        return (hidden, cell), (hidden, cell, jnp.stack([i, f, g, o]))

    zero = jnp.zeros_like(from_input[0, :, :, : kernel.shape[1]])
    return jax.lax.scan(step, (zero, zero), from_input, unroll=UNROLL)[1]


def _recurrence(from_input: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    hidden, cell, gates = _advance(from_input, kernel)
    return hidden, (hidden, cell, gates, kernel)


def _recurrence_transposed(kept: tuple, given: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, cell, gates, kernel = kept

    def before(states: jax.Array) -> jax.Array:  # those that enter each frame
        return jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])

    def step(state, frame):
        to_hidden, to_cell = state
        given, cell, entering, (i, f, g, o) = frame
        to_hidden, bent = to_hidden + given, jnp.tanh(cell)
        to_cell = to_cell + to_hidden * o * (1 - bent**2)
        parts = [
            to_cell * g * i * (1 - i),
            to_cell * entering * f * (1 - f),
            to_cell * i * (1 - g**2),
            to_hidden * bent * o * (1 - o),
        ]
        to_gates = jnp.concatenate(parts, axis=-1)
        back = jnp.einsum("kbg,kdg->kbd", to_gates.astype(kernel.dtype), kernel)
        return (back.astype(jnp.float32), to_cell * f), to_gates

    zero = jnp.zeros_like(given[0])
    frames = given, cell, before(cell), gates
    _, to_gates = jax.lax.scan(step, (zero, zero), frames, reverse=True, unroll=UNROLL)
    left, right = (x.astype(kernel.dtype) for x in (before(hidden), to_gates))
    return to_gates, jnp.einsum("fkbd,fkbg->kdg", left, right)


recurrence.defvjp(_recurrence, _recurrence_transposed)


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
        x = x + self.frame_position.astype(x.dtype)[None]
        for block in self.blocks:
            x = block(x)
        return x
