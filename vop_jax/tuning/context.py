"""Context-specific prompts: each frame's own prompts, generated from all frames of its clip.

    (6)  [m_1 … m_F] = CMM([c_1 … c_F])        over the CLS tokens that enter a layer
         C_j = split(FC(m_j))                  P * D numbers become the P prompts of frame j

The context modelling module (CMM) and the dense layer (FC) are shared by all layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vop_jax.clip.kernels import products
from vop_jax.clip.layers import Block
from vop_jax.tuning.methods import MethodConfig

TRANSFORMER_LAYERS = 4
HEAD_WIDTH = 64
# Frames per turn of the recurrence's loop. An accelerator computes a frame faster than it starts
# the operations of a turn, so fewer turns are faster; longer ones take long to compile.
UNROLL = 4

States = tuple[jax.Array, ...]
Carry = tuple[jax.Array, jax.Array]
Frame = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Context(nn.Module):
    """Equation (6): the CLS tokens of a clip [B, F, D] -> prompts of its frames [B, F, P, D]."""

    method: MethodConfig
    width: int
    tokens: int
    activation: str
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        m = self.method
        if m.cmm == "transformer":
            self.transformer = FrameTransformer(
                self.width, m.frames, m.init_std, self.activation, self.dtype
            )
        else:
            directions = {"lstm": 1, "bilstm": 2}[m.cmm]
            self.lstm = Lstm(self.width, directions, self.dtype)
        # Small, so that generated prompts start about as large as generic ones.
        init = nn.initializers.normal(m.init_std)
        self.stretch = products.Dense(self.tokens * self.width, kernel_init=init, dtype=self.dtype)

    def __call__(self, cls: jax.Array) -> jax.Array:
        if self.method.cmm == "transformer":
            self.method.check_frames(cls.shape[1])
            modulated = self.transformer(cls)
        else:
            modulated = self.lstm(cls)
        out = self.stretch(modulated)  # [B, F, P * D]
        return out.reshape(*cls.shape[:2], self.tokens, self.width)


class Lstm(nn.Module):
    """LSTM over frames [B, F, D] -> [B, F, directions * D], the equations of torch.nn.LSTM.

    Flax's cell projects its input at each frame and runs the two directions one after the other;
    here, for speed, all frames are projected in one product and both directions advance in one
    scan. Gates are in PyTorch's order: input, forget, cell, output.
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
        from_input = products.einsum("kbfd,kdg->kbfg", directed, input_kernel)
        from_input = from_input.transpose(2, 0, 1, 3).astype(jnp.float32)
        from_input = from_input + bias[None, :, None]  # [F, K, B, 4 D]

        states = recurrence(from_input, hidden_kernel)  # [F, K, B, D]
        both = [states[:, 0], states[::-1, 1]] if k == 2 else [states[:, 0]]
        return jnp.concatenate(both, axis=-1).swapaxes(0, 1).astype(self.dtype)


@jax.custom_vjp
def recurrence(from_input: jax.Array, hidden_kernel: jax.Array) -> jax.Array:
    """The outputs of an LSTM that starts at zero.

    The derivative is written out so that the kernel's gradient is one product over all frames;
    that of `scan` is a sum of products, read and written again at each frame.

    Args:
        from_input: float32 [F, K, B, 4 D], the part of the gates that is not recurrent.
        hidden_kernel: [K, D, 4 D], in the dtype of products.

    Returns:
        float32 [F, K, B, D].
    """
    return _advance(from_input, hidden_kernel)[0]


def _advance(from_input: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """(hidden, cell [F, K, B, D], gates after their activations [F, 4, K, B, D])."""

    def step(state: Carry, gates: jax.Array) -> tuple[Carry, States]:
        hidden, cell = state  # [K, B, D], float32
        gates = gates + products.einsum("kbd,kdg->kbg", hidden.astype(kernel.dtype), kernel)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
        cell = f * cell + i * g
        hidden = o * jnp.tanh(cell)
        return (hidden, cell), (hidden, cell, jnp.stack([i, f, g, o]))

    zero = jnp.zeros_like(from_input[0, :, :, : kernel.shape[1]])
    return jax.lax.scan(step, (zero, zero), from_input, unroll=UNROLL)[1]


def _recurrence_forward(from_input: jax.Array, kernel: jax.Array) -> tuple[jax.Array, States]:
    hidden, cell, gates = _advance(from_input, kernel)
    return hidden, (hidden, cell, gates, kernel)


def _recurrence_backward(saved: States, d_output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Backpropagation through time; `d_x` is the gradient of the loss with respect to x."""
    hidden, cell, gates, kernel = saved

    def before(states: jax.Array) -> jax.Array:  # the state that enters each frame
        return jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])

    def step(carry: Carry, frame: Frame) -> tuple[Carry, jax.Array]:
        d_hidden, d_cell = carry
        d_output, cell, cell_before, (i, f, g, o) = frame
        d_hidden, tanh_cell = d_hidden + d_output, jnp.tanh(cell)
        d_cell = d_cell + d_hidden * o * (1 - tanh_cell**2)
        parts = [
            d_cell * g * i * (1 - i),
            d_cell * cell_before * f * (1 - f),
            d_cell * i * (1 - g**2),
            d_hidden * tanh_cell * o * (1 - o),
        ]
        d_gates = jnp.concatenate(parts, axis=-1)
        d_before = products.einsum("kbg,kdg->kbd", d_gates.astype(kernel.dtype), kernel)
        return (d_before.astype(jnp.float32), d_cell * f), d_gates

    zero = jnp.zeros_like(d_output[0])
    frames = d_output, cell, before(cell), gates
    _, d_gates = jax.lax.scan(step, (zero, zero), frames, reverse=True, unroll=UNROLL)
    left, right = (x.astype(kernel.dtype) for x in (before(hidden), d_gates))
    return d_gates, products.einsum("fkbd,fkbg->kdg", left, right)


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


class FrameTransformer(nn.Module):
    """Transformer over frames [B, F, D] -> [B, F, D], with a position embedding of frames."""

    width: int
    frames: int
    init_std: float
    activation: str
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
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
